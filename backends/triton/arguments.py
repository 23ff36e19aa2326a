"""The arguments of a case: their shapes alone, or with numbers in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CaseRecord = dict[str, Any]


def read(case: CaseRecord, make: Callable[[CaseRecord], Tensor]) -> tuple[list[Any], CaseRecord]:
    """Positional and keyword arguments of a case of `kernels.json`; `make` makes its tensors."""
    import torch

    def argument(value: Any) -> Any:
        if isinstance(value, str):  # "sigmoid" is a text, "bfloat16" is not
            named = getattr(torch, value, None)
            return named if isinstance(named, torch.dtype) else value
        if isinstance(value, list):
            return [argument(one) for one in value]
        return make(value) if isinstance(value, dict) else value

    named = case.get("keywords", {}).items()
    return [argument(value) for value in case["arguments"]], {n: argument(v) for n, v in named}


def without_memory(value: CaseRecord) -> Tensor:
    """A tensor of which only the shape is there."""
    import torch

    made = torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device="meta")
    return made.as_strided(value["shape"], value["strides"]) if value.get("strides") else made


def arguments_of(
    case: CaseRecord, device: torch.device, seed: int = 0
) -> tuple[list[Any], CaseRecord]:
    """The arguments of a case with numbers in them; the same for the same seed."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def make(value: CaseRecord) -> Tensor:
        made = filled(value, generator)
        if not value.get("strides"):
            return made
        pairs = zip(made.shape, value["strides"], strict=True)
        room = 1 + sum((size - 1) * stride for size, stride in pairs)
        view = torch.empty(max(room, 0), dtype=made.dtype, device=device)
        return view.as_strided(made.shape, value["strides"]).copy_(made)

    positional, named = read(case, make)
    if case["function"] in ("attention_grad", "document_attention_grad"):
        _, q, k, v, *where, _, _, scale = positional
        positional[-3:-1] = _saved(q, k, v, *where, scale, **named)
    if case["function"] == "attention_varlen_grad":
        from runtime import gradients

        _, q, k, v, _, _, *sequences = positional
        positional[4:6] = gradients.attention_varlen_saving(q, k, v, *sequences)
    return positional, named


def _saved(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What `attention_saving` gives: a gradient takes results, those of q, k and v."""
    from runtime import functional

    function = functional.document_attention if len(rest) > 1 else functional.attention
    return function(q, k, v, *rest, **named), log_sum_exp(q, k, *rest, **named)


def log_sum_exp(
    q: Tensor, k: Tensor, *rest: Any, window: int | None = None, sinks: Tensor | None = None
) -> Tensor:
    """The natural logarithm of each query's sum of exponentials: float32 [batch, query, heads].

    `rest` is the scale, after positions where documents attend. Head by head, since the scores of
    all of them are 8 GiB for a sequence of V3's training.
    """
    import torch

    *position, scale = rest
    times, tail = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    key, last = (torch.arange(n, device=q.device) for n in (k.shape[1], q.shape[1]))
    last = last + tail
    first = torch.zeros_like(last) if window is None else last - window + 1
    if position:
        first = torch.maximum(first, last - position[0])
    hidden = (key > last[:, None]) | (key < first[..., None])
    levels = []
    for head in range(q.shape[2]):
        score = q[:, :, head].float() @ k[:, :, head // times].float().transpose(1, 2) * scale
        level = score.masked_fill(hidden, -torch.inf).logsumexp(-1)
        levels.append(level if sinks is None else level.logaddexp(sinks[head].float()))
    return torch.stack(levels, -1)


PIECE = 1 << 26
"""How many random numbers are made at a time, so that a large tensor needs no second one."""


def filled(value: CaseRecord, generator: torch.Generator) -> Tensor:
    """A tensor as `backends.triton.kernel.Tensor` describes it, on the device of the generator."""
    import torch

    shape, dtype = tuple(value["shape"]), getattr(torch, value["dtype"])
    init, limit, device = value["init"], value["limit"], generator.device
    if init in RANDOM:
        made = torch.empty(shape, dtype=dtype, device=device)
        for piece in torch.split(made.view(-1), PIECE):
            piece.copy_(RANDOM[init](len(piece), generator))
        return made
    if init in ("zeros", "ones"):
        return torch.full(shape, float(init == "ones"), device=device).to(dtype)
    if init == "ends":
        expert = torch.randint(shape[0], (limit,), generator=generator, device=device)
        return torch.bincount(expert, minlength=shape[0]).cumsum(0).to(dtype)
    if init == "starts":
        return torch.arange(0, math.prod(shape) * limit, limit, device=device).to(dtype)
    if init == "index":
        return _distinct(shape, limit, generator).to(dtype)
    if init in ("order", "pages"):
        count = math.prod(shape)
        places = torch.randperm(limit or count, generator=generator, device=device)
        return places[:count].view(shape).to(dtype)
    if init == "positions":
        return torch.arange(shape[-1], device=device).remainder(limit).expand(shape).to(dtype)
    if init == "lengths":
        return torch.randint(1, limit + 1, shape, generator=generator, device=device).to(dtype)
    raise ValueError(f"a case fills a tensor with {init!r}, which nothing here knows")


def _normal(count: int, generator: torch.Generator) -> Tensor:
    import torch

    return torch.randn(count, generator=generator, device=generator.device)


def _scale(count: int, generator: torch.Generator) -> Tensor:
    import torch

    return torch.rand(count, generator=generator, device=generator.device) + 0.5


def _bytes(count: int, generator: torch.Generator) -> Tensor:
    import torch

    return torch.randint(256, (count,), generator=generator, device=generator.device)


RANDOM: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "scale": _scale,
    "affinity": lambda count, generator: _normal(count, generator).sigmoid(),
    "bytes": _bytes,
}
"""By what a case fills a tensor with: so many random numbers."""


def _distinct(shape: tuple[int, ...], limit: int, generator: torch.Generator) -> Tensor:
    """Whole numbers below `limit`, those of a row distinct, as the experts of a token are."""
    import torch

    device = generator.device
    if len(shape) < 2 or shape[-1] > limit:
        return torch.randint(limit, shape, generator=generator, device=device)
    scores = torch.rand(math.prod(shape[:-1]), limit, generator=generator, device=device)
    return scores.topk(shape[-1], dim=-1).indices.view(shape)
