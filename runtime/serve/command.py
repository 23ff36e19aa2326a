"""What `python -m MODEL.serve` and `dslc serve` do with a built model."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from .. import compiled, config
from ..model import LanguageModel, Quantized
from ..shards import LoadError
from ..train.command import open_run, weights_in
from ..train.device import select_device
from ..train.memory import memory_of
from ..train.options import parse
from ..train.settings import TrainError
from ..train.tokenizer import Learned, Tokenizer, of_folder
from .divided import Divided, compute_prompts, make_divided
from .engine import Engine
from .front import Front
from .grammar import Grammars
from .options import Options
from .ranks import (
    Parallel,
    Served,
    is_follower,
    local_ranks,
    make_front,
    run_follower,
    world_size,
)
from .settings import Settings
from .spread import Balancing
from .text import Vocabulary, vocabulary_of

NEEDED = "fastapi, uvicorn, prometheus_client and jinja2"
EXAMPLES = """\
examples:
  python -m {name}.serve --checkpoint weights
  python -m {name}.serve --checkpoint weights --port 8080 --cache-memory 2048 --max-requests 16
  python -m {name}.serve --checkpoint weights --host 0.0.0.0 --api-key "$KEY"

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"prompt": "Once upon a time", "max_tokens": 20}}'
"""


def main(model: type[LanguageModel], arguments: Sequence[str] | None = None) -> int:
    """Serves with the options of a command line (sys.argv by default); returns the exit status.

    0: ended by a signal, 1: failed, 2: wrong usage.
    """
    name = model.config.model
    about = f"Serve {name} over HTTP, with the API of OpenAI."
    settings = parse(
        Settings, f"python -m {name}.serve", about, arguments, EXAMPLES.format(name=name)
    )
    try:
        return serve(model, settings)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def serve_run(model: type[LanguageModel], run: Path, settings: Settings, average: bool) -> int:
    """Serves the newest checkpoint of a run, or its moving average. Raises TrainError."""
    _, tokens, checkpoint = open_run(run)
    found = dataclasses.replace(settings, checkpoint=weights_in(checkpoint, average))
    return serve(model, found, tokens.tokenizer)


def serve(
    model: type[LanguageModel], settings: Settings, tokenizer: Tokenizer | None = None
) -> int:
    """Serves until a signal; gives the exit status, 1 where the engine ended by itself.

    `tokenizer` is in place of that in the folder of the weights. Raises TrainError for what cannot
    be served.
    """
    try:
        from .chat import Chat, ChatError, template_of
        from .lifetime import listen, run
        from .server import make_app
        from .service import Limits, ServedModel, Service
        from .worker import Unavailable, Worker
    except ModuleNotFoundError as error:
        raise TrainError(f"{error}: serving needs {NEEDED} (pip install)") from None
    folder = settings.checkpoint
    if not any(folder.glob("*.safetensors")):
        raise TrainError(f"{folder} holds no safetensors")
    if settings.tokenizer is not None:
        tokenizer = Learned(settings.tokenizer)
    vocabulary = vocabulary_of(tokenizer or of_folder(folder))
    options = engine_options(settings)
    make, follow = on_this_rank(model, settings, options, vocabulary)
    if follow is not None and is_follower():
        return _follow(follow)
    try:
        template = template_of(folder, vocabulary, settings.chat_template)
        served = ServedModel(
            settings.name or model.config.model,
            vocabulary,
            None if template is None else Chat(template, vocabulary),
            end_tokens(model, folder),
            fingerprint(model, folder, options, settings.weights),
        )
        service = Service(
            served,
            Worker(make),
            Limits(
                settings.max_pending,
                settings.max_body * 1024,
                first_token=settings.first_token_timeout,
                answer=settings.answer_timeout,
            ),
        )
        try:
            listener = listen(settings.host, settings.port)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            where = f"{settings.host} port {settings.port}"
            raise TrainError(f"cannot listen at {where}: {reason}") from None
        keys = [*settings.api_key, *filter(None, [os.environ.get("DSLC_API_KEY")])]
        hosts = local_names(settings.host)
        app = make_app(service, keys, hosts, page=not settings.no_page)
        port = listener.getsockname()[1]

        def ready(_: Any) -> None:
            _print_ready(service.model.name, service.worker.max_model_len, settings.host, port)

        if hosts is None and not keys:
            print("warning: without --api-key, all who reach it can use it", file=sys.stderr)
        return asyncio.run(run(service, app, listener, settings.drain, ready))
    except (ChatError, Unavailable) as error:
        raise TrainError(str(error)) from None
    except KeyboardInterrupt:
        return 130


def _print_ready(name: str, longest: int, host: str, port: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {name} at http://{shown}:{port}/ (max_model_len {longest})", flush=True)


def on_this_rank(
    model: type[LanguageModel], settings: Settings, options: Options, vocabulary: Vocabulary
) -> tuple[Callable[[], Engine | Front | Divided], Callable[[], None] | None]:
    """How the process of the engine makes it, and what other ranks do, if there are any.

    Raises TrainError for options and ranks that do not go together.
    """
    if settings.weights is not None:
        try:
            model(device="meta", weights=_form(settings.weights))
        except ValueError as error:
            raise TrainError(str(error)) from None
    single = partial(
        make_engine, model, settings.checkpoint, settings.device, options, vocabulary,
        settings.weights,
    )  # fmt: skip
    if settings.prefill_ranks:
        check_prefill_ranks(settings)
        patience = settings.patience
        return partial(make_divided, patience, single), partial(compute_prompts, patience, single)
    ranks = ranks_of(model, settings, options, vocabulary)
    if ranks is None:
        return single, None
    return partial(_make_front, ranks), partial(run_follower, ranks)


def ranks_of(
    model: type[LanguageModel], settings: Settings, options: Options, vocabulary: Vocabulary
) -> Served | None:
    """What each rank serves; None for a single process that counts no loads.

    Raises TrainError for options that are for several ranks.
    """
    redundant, every = settings.redundant_experts, settings.rebalance
    if settings.weights is not None and (world_size() > 1 or settings.record_load is not None):
        raise TrainError("--weights is for one process that records no loads of experts")
    if world_size() == 1:
        if redundant or every or settings.expert_load is not None:
            raise TrainError(
                "--redundant-experts, --rebalance and --expert-load are for several ranks: start "
                "them with torchrun --nproc-per-node N -m .."
            )
        if settings.record_load is None:
            return None
    balancing = Balancing(redundant, every, record=settings.record_load)
    return Served(
        model,
        settings.checkpoint,
        settings.device,
        options,
        threads(),
        free_memory,
        partial(make_grammars, model, settings.checkpoint, vocabulary),
        Parallel(balancing, settings.expert_load, settings.patience),
    )


def check_prefill_ranks(settings: Settings) -> None:
    """Raises TrainError where ranks cannot be divided so."""
    ranks, size = settings.prefill_ranks, world_size()
    if size != ranks + 1:
        raise TrainError(
            f"--prefill-ranks {ranks} needs {ranks + 1} ranks, of which the first answers, not "
            f"{size}: start them with torchrun --nproc-per-node {ranks + 1} -m .."
        )
    if settings.redundant_experts or settings.rebalance or settings.expert_load is not None:
        raise TrainError("--prefill-ranks is for ranks with all experts each, which have no places")
    if settings.record_load is not None:
        raise TrainError("--record-load is not for --prefill-ranks, which count no loads")


def _follow(run: Callable[[], None]) -> int:
    try:
        run()
    except (ValueError, LoadError) as error:
        raise TrainError(str(error)) from None
    return 0


def _make_front(ranks: Served) -> Front:
    """Raises ValueError for weights and options that do not fit."""
    try:
        return make_front(ranks)
    except (TrainError, LoadError) as error:
        raise ValueError(str(error)) from None


def local_names(host: str) -> tuple[str, ...] | None:
    """The names by which a server of this machine alone is called; None for others."""
    from .gate import LOCAL

    return LOCAL if host in ("127.0.0.1", "localhost", "::1") else None


def engine_options(settings: Settings) -> Options:
    memory = settings.cache_memory
    return Options(
        max_model_len=settings.max_model_len,
        cache_bytes=None if memory is None else memory * 2**20,
        page=settings.page,
        max_requests=settings.max_requests,
        step_tokens=settings.step_tokens,
        prefix_cache=not settings.no_prefix_cache,
        speculate=settings.speculate,
    )


def threads() -> int:
    """Of the engine: one core is left to the server where there are more than two."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    one = cores - 1 if cores > 2 else torch.get_num_threads()
    return max(one // local_ranks(), 1)


def make_engine(
    model: type[LanguageModel],
    folder: Path,
    device: str | None,
    options: Options,
    vocabulary: Vocabulary,
    weights: str | None = None,
) -> Engine:
    """In the process of the engine. Raises ValueError for weights and options that do not fit."""
    torch.set_num_threads(threads())
    try:
        place = select_device(device)
        loaded: Any = model(device="meta", weights=_form(weights))  # its cache is of either kind
        loaded.load(folder)
        loaded = loaded.to(place)
        if options.cache_bytes is None:
            free = free_memory(place) // local_ranks()
            options = dataclasses.replace(options, cache_bytes=free)
        return Engine(loaded, options, make_grammars(model, folder, vocabulary))
    except (TrainError, LoadError) as error:
        raise ValueError(str(error)) from None


def _form(weights: str | None) -> Quantized | None:
    """As a model takes it, which says what it cannot have."""
    return cast("Quantized | None", weights)


def make_grammars(model: type[LanguageModel], folder: Path, vocabulary: Vocabulary) -> Grammars:
    return Grammars(vocabulary, model.config.params.vocab_size, end_tokens(model, folder))


def free_memory(device: torch.device) -> int:
    """Bytes that a KV cache may take, beside a loaded model: of a GPU nine tenths of what is free,
    of a machine half."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # a system that does not say
        free = 2**33
    # A container, or the process, may have less than the machine.
    return min(free, memory_of(device) or free) // 2


def end_tokens(model: type[LanguageModel], folder: Path) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json, config.json, or the spec."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))["eos_token_id"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(id) is int for id in ids):
            return frozenset(ids)
    return frozenset(config.end_tokens(model.config))


def fingerprint(
    model: type[LanguageModel], folder: Path, options: Options, weights: str | None = None
) -> str:
    """A hash of the build, the weights and what else the bits of an answer depend on.

    Of each file of weights it takes the size, and 64 KiB of the beginning and the end.
    """
    digest = hashlib.sha256()
    for part in (*_facts(model, folder, options), repr(weights).encode()):
        digest.update(hashlib.sha256(part).digest())
    return f"fp_{digest.hexdigest()[:20]}"


def _facts(model: type[LanguageModel], folder: Path, options: Options) -> Iterator[bytes]:
    source = sys.modules[model.__module__].__file__
    manifest = Path(source or "").with_name("manifest.json")
    yield manifest.read_bytes() if manifest.is_file() else b""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            yield f"{path.name} {size}".encode()
            file.seek(0)
            yield file.read(2**16)
            file.seek(max(size - 2**16, 0))
            yield file.read()
    cpu = torch.backends.cpu.get_cpu_capability()
    steps = compiled.fingerprint(model)
    yield repr((torch.__version__, cpu, threads(), options.page, steps)).encode()
