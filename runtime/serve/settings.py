"""The options of serving, declared once for `python -m MODEL.serve` and `dslc serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..train.options import Option
from .options import MOST_DRAFTS


@dataclass(frozen=True)
class Settings:
    """The options of a command line; None: as the text of the option says."""

    checkpoint: Annotated[
        Path, Option("The weights: a folder of safetensors, with its tokenizer.", "DIR")
    ]
    weights: Annotated[
        str | None,
        Option("Hold weights of products quantized: fp8 or int8 [as they are].", "FORM"),
    ] = None
    host: Annotated[
        str, Option("The address to listen at; 0.0.0.0 is every one [127.0.0.1].", "ADDRESS")
    ] = "127.0.0.1"
    port: Annotated[int, Option("The port; 0 is any free one [8000].", "N", 0, 65535)] = 8000
    name: Annotated[
        str | None, Option("What clients call the model [that of its spec].", "NAME")
    ] = None
    api_key: Annotated[
        tuple[str, ...],
        Option("A key that clients must have; also DSLC_API_KEY. Repeatable.", "KEY"),
    ] = ()
    tokenizer: Annotated[
        Path | None,
        Option("A tokenizer.json [that with the weights; without one tokens are bytes].", "FILE"),
    ] = None
    chat_template: Annotated[
        Path | None, Option("A chat template in Jinja [that with the weights].", "FILE")
    ] = None
    max_model_len: Annotated[
        int | None,
        Option("Most tokens of prompt and answer [max_position_embeddings].", "N", 1),
    ] = None
    cache_memory: Annotated[
        int | None,
        Option("MiB of the KV cache [as --max-requests need, half of free memory].", "MIB", 1),
    ] = None
    page: Annotated[int, Option("Tokens of a block of the KV cache [64].", "N", 1)] = 64
    max_requests: Annotated[int, Option("Answers computed at a time [64].", "N", 1)] = 64
    step_tokens: Annotated[int, Option("Most tokens of a step of the engine [512].", "N", 1)] = 512
    no_prefix_cache: Annotated[
        bool, Option("Compute every prompt whole, even if it begins as an earlier one.")
    ] = False
    speculate: Annotated[
        int, Option("Tokens that MTP modules draft for each step, 0 to 4 [0].", "N", 0, MOST_DRAFTS)
    ] = 0
    prefill_ranks: Annotated[
        int, Option("Ranks that compute prompts for the first one, which answers [0].", "N", 0)
    ] = 0
    redundant_experts: Annotated[
        int, Option("Copies of experts in every layer, on several ranks [0].", "N", 0)
    ] = 0
    rebalance: Annotated[
        int, Option("Steps after which experts are placed by load; 0 is never [0].", "N", 0)
    ] = 0
    expert_load: Annotated[
        Path | None, Option("Loads by which they are placed at first [even].", "FILE")
    ] = None
    record_load: Annotated[
        Path | None, Option("Write the loads of experts there [nowhere].", "FILE")
    ] = None
    patience: Annotated[
        int, Option("Seconds that a rank waits for another before all end [5].", "SECONDS", 1)
    ] = 5
    max_pending: Annotated[
        int, Option("Answers that run or wait; above, requests get a 429 [512].", "N", 1)
    ] = 512
    first_token_timeout: Annotated[
        int | None,
        Option("Seconds until an answer must have begun, or it fails with a 503.", "SECONDS", 1),
    ] = None
    answer_timeout: Annotated[
        int | None, Option("Seconds until an answer is cut off.", "SECONDS", 1)
    ] = None
    max_body: Annotated[int, Option("Most KiB of a request [4096].", "KIB", 1)] = 4096
    drain: Annotated[
        int, Option("Seconds that answers have to end after a first signal [30].", "SECONDS", 0)
    ] = 30
    no_page: Annotated[bool, Option("No chat page at /.")] = False
    device: Annotated[
        str | None, Option("cpu, cuda or cuda:N [a GPU if there is one].", "DEVICE")
    ] = None
