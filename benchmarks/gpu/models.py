"""Whole models on the GPU at hand: training steps and decoding, against transformers in one run.

`python benchmarks/gpu/models.py` from the repository's root; `--help` lists how to run less. The
model is a slice of V3: its widths, 1 dense and 2 MoE layers of 64 experts, 7 B weights. Steps are
those of the built packages with kernels, in BF16 and FP8, launched one by one and as CUDA graphs;
decoding is greedy, behind 512 tokens, by a contiguous cache, by pages, and by the engine. The
host's time (`host_ms`) is that until all of a step is launched. Each row is printed and written to
`gpu_models.json` as it comes; a row that fails says why. `--device cpu` shows that it runs.
With `--packages DIR` it takes packages that `prepare` has built, and needs nothing of dslc.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from runtime.dispatch import name_of  # noqa: E402

SLICE = (
    "architecture.layers.0.repeat=1",
    "architecture.layers.1.repeat=2",
    "architecture.mtp.depth=0",
    "params.n_routed_experts=64",
    "parallel=null",
)
BATCHES = (1, 64, 16, 128)
DECODED = 16
"""Steps of decoding that are timed together."""

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="deepseek_v3", help="cut to a slice if it is V3")
    parser.add_argument("--tokens", type=int, default=4096, help="of a training step")
    parser.add_argument("--context", type=int, default=512, help="tokens before decoding")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new row after that")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--packages", type=Path, help="a folder that has them already")
    parser.add_argument("--out", type=Path, default=Path("build"))
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run, and nothing is claimed")
        return
    end = time.monotonic() + 60 * asked.minutes
    record = Record(asked)
    for name, job in jobs(asked):
        if time.monotonic() > end:
            print(f"the time is over: {name} and what follows was not run")
            break
        record.add(name, job)


class Record:
    """`gpu_models.json`, written again after each row."""

    def __init__(self, asked: argparse.Namespace) -> None:
        gpu = torch.cuda.get_device_name(0) if asked.device == "cuda" else "cpu"
        self.facts = {"device": gpu, "torch": torch.__version__, "command": " ".join(sys.argv)}
        asked.out.mkdir(parents=True, exist_ok=True)
        self.file = asked.out / "gpu_models.json"
        self.rows: list[Row] = []

    def add(self, name: str, job: Callable[[], Row]) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            row = job()
        except Exception as error:  # whatever a library raises is what the row says
            row = {
                "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            }
        if torch.cuda.is_available():
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row = {"row": name, **row}
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        self.file.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def jobs(asked: argparse.Namespace) -> Iterator[Job]:
    """The most important first; a model is dropped before the next one is made."""
    yield from (job for precision in ("bf16", "fp8") for job in our_training(asked, precision))
    yield from peer_training(asked)
    yield from (job for precision in ("bf16", "fp8") for job in our_decoding(asked, precision))
    yield from peer_decoding(asked)


# ---- dslc ----------------------------------------------------------------------------------------


PACKAGES = {
    "gpu_bf16_all": "precision.policy=bf16",
    "gpu_fp8_all": "precision.policy=fp8_blockwise",
    "gpu_fp8_fp8": "precision.policy=fp8_blockwise",
}
"""By precision and by how weights are held; what the spec is set to."""


def prepare(folder: Path, spec: str, target: str | None) -> None:
    """Builds every package that the rows need."""
    from backends.build import build
    from backends.triton.target import TARGETS
    from dslc.specs import read

    gpu = TARGETS.get(target) if target else None
    cut = SLICE if spec == "deepseek_v3" else ()
    for name, policy in PACKAGES.items():
        sets = [*cut, policy, f"model={name}"]
        build(read(spec, sets, None), folder / name, target=gpu)
    peer = [*(cut or ("architecture.mtp.depth=0",)), "model=gpu_peer"]
    build(read(spec, peer, None), folder / "gpu_peer")


def package(asked: argparse.Namespace, name: str) -> Any:
    """A package of `--packages`, or of a folder that is made at first use."""
    if asked.packages is None:
        asked.packages = Path(tempfile.mkdtemp())
        prepare(asked.packages, asked.spec, name_of(0) if asked.device == "cuda" else None)
    if str(asked.packages) not in sys.path:
        sys.path.insert(0, str(asked.packages))
    return importlib.import_module(name)


class Ours:
    """A built package in one precision, and its model, made when it is first asked for."""

    def __init__(self, asked: argparse.Namespace, precision: str, held: str | None = None) -> None:
        self.package = f"gpu_{precision}_{held or 'all'}"
        self.module = package(asked, self.package)
        self.model = self.module.Model(
            device=asked.device, dtype=torch.bfloat16, seed=0, weights=held
        )
        self.vocab = self.model.config.params.vocab_size

    def part(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.runtime.{name}")


def our_training(asked: argparse.Namespace, precision: str) -> Iterator[Job]:
    made: list[Ours] = []

    def step() -> Any:
        ours = made[0]
        ours.model.zero_grad()
        loss = ours.model.loss(*text(asked, ours.vocab)).total
        loss.backward()
        return loss

    def first() -> Row:
        start = time.monotonic()
        made.append(Ours(asked, precision))
        sync(asked)
        ready = time.monotonic()
        loss = step().item()
        return {"make_s": ready - start, "first_step_s": time.monotonic() - ready, "loss": loss}

    def steps() -> Row:
        seconds = timed(step, asked)
        again = [step().item() for _ in range(2)]
        rate = {"ms": 1e3 * seconds, "tokens_per_s": asked.tokens / seconds}
        return {**rate, "same_bits": again[0] == again[1]}

    def captured() -> Row:
        graphs = made[0].part("graphs").Graphs("the training step", made[0].model.device)
        for _ in range(3):
            graphs.run("step", step)
        seconds = timed(lambda: graphs.run("step", step), asked)
        same = graphs.run("step", step).item() == step().item()
        return {"ms": 1e3 * seconds, "tokens_per_s": asked.tokens / seconds, "same_bits": same}

    yield f"dslc {precision}: first step", first
    yield f"dslc {precision}: training step", steps
    if asked.device == "cuda":
        yield f"dslc {precision}: training step as a CUDA graph", captured
    yield f"dslc {precision}: kernels of a step", lambda: shares(step, asked)
    made.clear()


def our_decoding(asked: argparse.Namespace, precision: str) -> Iterator[Job]:
    made: list[Ours] = []

    def run(
        decode: Callable[[argparse.Namespace, Ours, int], Row], batch: int, graphs: str = "off"
    ) -> Row:
        if not made:
            made.append(Ours(asked, precision, "fp8" if precision == "fp8" else None))
        os.environ[made[0].part("graphs").VARIABLE] = graphs
        made[0].part("graphs").wanted.cache_clear()
        return decode(asked, made[0], batch)

    for batch in asked.batch:
        yield f"dslc {precision}: decode {batch}", partial(run, contiguous, batch)
        for how, name in ((paged, "pages"), (served, "engine")):
            for graphs, with_them in (("on", "CUDA graphs"), ("off", "no graphs")):
                row = f"dslc {precision}: {name} {batch}, {with_them}"
                yield row, partial(run, how, batch, graphs)
    made.clear()


@torch.inference_mode()
def contiguous(asked: argparse.Namespace, ours: Ours, batch: int) -> Row:
    """By `decode` and a contiguous cache."""
    cache = ours.part("cache").Cache(batch, asked.context + DECODED * (asked.rounds + 2) + 1)
    place = torch.arange(asked.context, device=asked.device).expand(batch, -1)
    ours.model.prefill(prompt(asked, ours.vocab, batch), place, cache)
    token = torch.full((batch, 1), 7, device=asked.device)
    positions = count(asked.context)

    def step() -> None:
        position = torch.full((batch, 1), next(positions), device=asked.device)
        ours.model.decode(token, position, cache).argmax(-1)

    return decoding(step, asked, batch)


@torch.inference_mode()
def paged(asked: argparse.Namespace, ours: Ours, batch: int) -> Row:
    """What a step of the engine has computed, alone; keys are zeros."""
    pages, page = ours.part("pages"), 64
    each = asked.context // page + 1
    kernel = ours.model.paged_latent_attention if asked.device == "cuda" else None
    cache = pages.Pages(batch * each + 1, page, kernel)
    blocks = [range(1 + i * each, 1 + (i + 1) * each) for i in range(batch)]
    sequences = [(own, asked.context, 1) for own in blocks]
    rows, position = pages.make_rows(sequences, range(batch), page, asked.device)
    token, decoder = torch.full_like(position, 7), ours.part("compiled").served(ours.model)

    def step() -> None:
        cache.begin(rows)
        decoder.decode(token, position, cache)

    with ours.part("matmul").batch_invariant():
        return decoding(step, asked, batch)


def served(asked: argparse.Namespace, ours: Ours, batch: int) -> Row:
    """By the engine, one request each."""
    new = DECODED * (asked.rounds + 3)
    options = ours.part("serve.options").Options(
        max_requests=batch, max_model_len=asked.context + new, step_tokens=4096
    )
    engine = ours.part("serve.engine").Engine(ours.model, options)
    sampling = ours.part("serve.request").Sampling(max_tokens=new)
    for i, row in enumerate(prompt(asked, ours.vocab, batch).tolist()):
        engine.add(str(i), row, sampling)
    while engine.stats()["generated_tokens"] < batch:
        engine.step()
    return decoding(engine.step, asked, batch)


# ---- transformers --------------------------------------------------------------------------------


def peer_model(asked: argparse.Namespace) -> Any:
    """Transformers' model of the same numbers, with random weights made on the device."""
    from transformers import AutoConfig, DeepseekV3ForCausalLM

    config = package(asked, "gpu_peer").Model.hf_config
    values = {**config, "quantization_config": None}
    name = values.pop("model_type")
    made = AutoConfig.for_model(name, **{k: v for k, v in values.items() if v is not None})
    with torch.device(asked.device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = DeepseekV3ForCausalLM._from_config(made, experts_implementation="grouped_mm")
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def peer_training(asked: argparse.Namespace) -> Iterator[Job]:
    made: list[Any] = []

    def steps(compiled: bool) -> Row:
        if not made:
            made.append(peer_model(asked))
        run = torch.compile(made[0]) if compiled else made[0]
        tokens, labels = text(asked, made[0].config.vocab_size)

        def step() -> Any:
            made[0].zero_grad()
            scores = run(tokens).logits.float().flatten(0, 1)
            torch.nn.functional.cross_entropy(scores, labels.flatten()).backward()  # type: ignore[no-untyped-call]

        seconds = timed(step, asked)
        return {"ms": 1e3 * seconds, "tokens_per_s": asked.tokens / seconds}

    yield "transformers: training step", lambda: steps(False)
    if not asked.no_compile:
        yield "transformers compiled: training step", lambda: steps(True)
    made.clear()


def peer_decoding(asked: argparse.Namespace) -> Iterator[Job]:
    made: list[Any] = []

    @torch.inference_mode()
    def decode(batch: int) -> Row:
        from transformers import DynamicCache

        if not made:
            made.append(peer_model(asked).eval())
        model = made[0]
        cache = DynamicCache(config=model.config)
        model(prompt(asked, model.config.vocab_size, batch), past_key_values=cache)
        token = torch.full((batch, 1), 7, device=asked.device)

        def step() -> None:
            model(token, past_key_values=cache).logits.argmax(-1)

        return decoding(step, asked, batch)

    for batch in asked.batch:
        yield f"transformers: decode {batch}", partial(decode, batch)
    made.clear()


# ---- measuring -----------------------------------------------------------------------------------


def text(asked: argparse.Namespace, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, tokens], and the one after each of them."""
    drawn = prompt(asked, vocab, 1, asked.tokens + 1)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def prompt(
    asked: argparse.Namespace, vocab: int, batch: int, length: int | None = None
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(2, vocab, (batch, length or asked.context), generator=generator)
    return drawn.to(asked.device)


def sync(asked: argparse.Namespace) -> None:
    if asked.device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], asked: argparse.Namespace) -> float:
    """Median seconds of a call, after two that do not count."""
    found = []
    for turn in range(asked.rounds + 2):
        sync(asked)
        start = time.perf_counter()
        run()
        sync(asked)
        if turn > 1:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def decoding(step: Callable[[], object], asked: argparse.Namespace, batch: int) -> Row:
    """Of a step for so many sequences."""

    def several() -> None:
        for _ in range(DECODED):
            step()

    seconds = timed(several, asked) / DECODED
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    sync(asked)
    return {"ms": 1e3 * seconds, "host_ms": 1e3 * host, "tokens_per_s": batch / seconds}


def shares(run: Callable[[], object], asked: argparse.Namespace, most: int = 14) -> Row:
    """Milliseconds of the longest kernels of a call."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if asked.device == "cuda" else []
    with profile(activities=kinds) as record:
        run()
        sync(asked)
    on_gpu = asked.device == "cuda"
    times = {
        event.key[:70]: (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in record.key_averages()
        if str(event.device_type).endswith("CUDA") == on_gpu
    }
    longest = sorted(times.items(), key=lambda one: -one[1])[:most]
    return {"total_ms": sum(times.values()) / 1e3, "ms": {k: v / 1e3 for k, v in longest}}


if __name__ == "__main__":
    main()
