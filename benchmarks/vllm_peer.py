"""vLLM as a peer of `serve.py`: run by the interpreter of an environment that has it.

    python vllm_peer.py WEIGHTS PROMPTS NEW

It loads a folder of weights, says `ready`, and for each line of its input generates NEW tokens for
all prompts (a JSON file of lists of token ids), then says `done` and the number of tokens.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def main() -> None:
    weights, prompts, new = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what else it prints is no answer
    texts = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    longest = max(len(text["prompt_token_ids"]) for text in texts) + int(new)
    model = LLM(
        weights,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=len(texts),
        block_size=16,
        enable_prefix_caching=False,
        seed=0,
    )
    sampling = SamplingParams(max_tokens=int(new), temperature=0, ignore_eos=True, detokenize=False)
    print("ready", file=out)
    for _ in sys.stdin:
        answers = model.generate(texts, sampling, use_tqdm=False)
        print("done", sum(len(answer.outputs[0].token_ids) for answer in answers), file=out)


if __name__ == "__main__":
    main()
