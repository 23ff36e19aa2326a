"""Tokens a second of forward, loss and backward on the CPU, against transformers in one run.

Run it with `python benchmarks/train_step.py` from the repository's root; `--help` lists how to run
less. Ratios carry over to other machines, rates do not. The peer's loss has no balance term; ours
computes it and the experts' load.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peer import Match, matches, options, profile, race, report
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from compiler.analysis import total
from compiler.pipeline import compile
from dslc.commands.show import summarized

BATCH, SEQ = 8, 256


def main() -> None:
    asked = options("Training on the CPU: tokens a second against transformers.")
    for match in matches(asked):
        print(f"{match.title}, {BATCH} sequences of {SEQ} tokens", flush=True)
        vocab = match.ours.config.params.vocab_size
        if asked.profile:
            profile(partial(ours, match.ours, batches(vocab)))
            continue
        runs = {"dslc": partial(ours, match.ours, batches(vocab))}
        for peer in match.peers:
            loss = torch.compile(peer_loss) if peer.compiled else peer_loss
            runs[peer.name] = partial(theirs, peer.model, loss, batches(vocab))
        ceiling = Ceiling(match)
        products = {"linear": ceiling.torch_linear, "onednn": ceiling.onednn}
        seconds = race({**runs, **products}, asked)
        rate = ceiling.flops / min(seconds.pop(name) for name in products)
        report(seconds, BATCH * SEQ)
        needed = (
            BATCH * SEQ * total(summarized(compile(match.description), SEQ, SEQ).training_flops)
        )
        share = needed / seconds["dslc"] / rate
        print(f"  matmul ceiling           {rate / 1e9:10,.0f} GFLOP/s, of which dslc {share:.0%}")


def batches(vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels, others in each step as in training: each routing has its own shapes."""
    generator = torch.Generator().manual_seed(0)
    while True:
        text = torch.randint(vocab, (BATCH, SEQ + 1), generator=generator)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def ours(model: Any, batch: Iterator[tuple[Tensor, Tensor]]) -> None:
    model.zero_grad()
    model.loss(*next(batch)).total.backward()


def theirs(model: Any, loss: Any, batch: Iterator[tuple[Tensor, Tensor]]) -> None:
    model.zero_grad()
    loss(model, *next(batch)).backward()


def peer_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x, use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), y.flatten())


class Ceiling:
    """A dense product of the step's tokens with a matrix as wide as the model is.

    By the faster of torch's two libraries: `F.linear` takes MKL for float32, oneDNN for bfloat16.
    """

    def __init__(self, match: Match) -> None:
        hidden = match.ours.config.params.hidden_size
        self.x = torch.randn(BATCH * SEQ, hidden).to(match.dtype)
        self.weight = torch.randn(4 * hidden, hidden).to(match.dtype)
        self.flops = 2 * self.x.numel() * len(self.weight)

    def torch_linear(self) -> None:
        linear(self.x, self.weight)

    def onednn(self) -> None:
        torch.ops.mkldnn._linear_pointwise(self.x, self.weight, None, "none", [], "")


if __name__ == "__main__":
    main()
