"""Blocks of specs/examples against plain torch: scores, gradients, and decoding with a cache."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_f

from backends.build import build
from backends.triton.target import TARGETS
from dsl.load import load
from tests.support.models import published
from tests.support.places import SPECS

COUNTER = itertools.count()
BATCH, SEQ = 2, 9
MTP = {"gated_mla"}  # examples with MTP modules


def built(name: str, folder: Path) -> Any:
    """A model of specs/examples in float64, with weights large enough to matter."""
    package = f"{name}_{next(COUNTER)}"
    # The loss is that of scores alone.
    sets = ["train.loss.balance_alpha=0", *(["architecture.mtp.depth=0"] if name in MTP else [])]
    description = load(SPECS / "examples" / f"{name}.yaml", sets=sets)
    build(
        description, folder / package, target=TARGETS["sm_90"]
    )  # what has no kernel runs in torch
    sys.path.insert(0, str(folder))
    try:
        model = importlib.import_module(package).Model(dtype=torch.float64, seed=3)
    finally:
        sys.path.remove(str(folder))
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for one in published(model):
            noise = torch.randn(one.shape, generator=generator, dtype=torch.float64)
            one.take(one.tensor + 0.2 * noise)
    return model


# ---- references: of the published weights of a block, by name, and its input -------------------

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch_f.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def swiglu(w: Weights, x: Tensor, at: str = "") -> Tensor:
    hidden = torch_f.silu(linear(w, f"{at}gate_proj", x)) * linear(w, f"{at}up_proj", x)
    return linear(w, f"{at}down_proj", hidden)


def gated_shared_moe(w: Weights, x: Tensor) -> Tensor:
    score = torch.softmax(linear(w, "gate", x), -1)
    chosen = score.topk(4, -1).indices
    y = torch.sigmoid(linear(w, "shared_expert_gate", x)) * swiglu(w, x, "shared_expert.")
    for e in range(score.shape[-1]):
        weight = score[..., e] * (chosen == e).any(-1) / score.gather(-1, chosen).sum(-1)
        y = y + weight[..., None] * swiglu(w, x, f"experts.{e}.")
    return y


def rms_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch_f.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], eps=1e-6)


def rotate(x: Tensor) -> Tensor:
    """x [batch, seq, heads, dim] turned by position, in pairs (2i, 2i + 1); angles in float32."""
    frequency = 1 / 10000.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None] * frequency
    turn = torch.complex(angle.cos(), angle.sin()).to(torch.complex128)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [batch, seq, heads, dim], causal; heads share keys where there are fewer of them."""
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(q.shape[1], k.shape[1]).triu(1).bool()
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def gated_mla(w: Weights, x: Tensor) -> Tensor:
    heads, nope, rope = 4, 16, 8
    q = linear(w, "q_b_proj", rms_norm(w, "q_a_layernorm", linear(w, "q_a_proj", x)))
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([nope, rope], -1)
    c, k_rope = linear(w, "kv_a_proj_with_mqa", x).split([24, rope], -1)
    kv = linear(w, "kv_b_proj", rms_norm(w, "kv_a_layernorm", c)).unflatten(-1, (heads, -1))
    k_nope, v = kv.split([nope, 16], -1)
    k_rope = rotate(k_rope[:, :, None]).expand(-1, -1, heads, -1)
    o = attend(torch.cat([q_nope, rotate(q_rope)], -1), torch.cat([k_nope, k_rope], -1), v)
    gate = torch.sigmoid(linear(w, "gate_proj", x)).unflatten(-1, (heads, -1))
    return linear(w, "o_proj", (gate * o).flatten(-2))


def biased_attention(w: Weights, x: Tensor) -> Tensor:
    q, k, v = (linear(w, f"{n}_proj", x).unflatten(-1, (-1, 16)) for n in "qkv")
    q, k = rotate(rms_norm(w, "q_norm", q)), rotate(rms_norm(w, "k_norm", k))
    return linear(w, "o_proj", (attend(q, k, v) * w["head.scale"]).flatten(-2))


def biased_moe(w: Weights, x: Tensor) -> Tensor:
    score = linear(w, "router", x).softmax(-1)
    chosen = score.topk(2, -1).indices
    y = torch.zeros_like(x)
    for e in range(score.shape[-1]):
        gate, up = (linear(w, f"experts.{e}.{n}_proj", x) for n in ("gate", "up"))
        out = linear(w, f"experts.{e}.down_proj", torch_f.gelu(gate, approximate="tanh") * up)
        weight = score[..., e] * (chosen == e).any(-1) / score.gather(-1, chosen).sum(-1)
        y = y + weight[..., None] * out
    return y


def part(w: Weights, name: str) -> Weights:
    return {n.removeprefix(f"{name}."): t for n, t in w.items() if n.startswith(f"{name}.")}


def layer_norm_layer(w: Weights, x: Tensor) -> Tensor:
    def norm(name: str, x: Tensor) -> Tensor:
        return torch_f.layer_norm(x, (64,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = x + biased_attention(part(w, "self_attn"), norm("input_layernorm", x))
    y = biased_moe(part(w, "mlp"), norm("post_attention_layernorm", x))
    return x + torch.tanh(w["residual.gate"]) * y


Reference = Callable[[Weights, Tensor], Tensor]
# What each example puts into its last layer, by place.
REFERENCES: dict[str, dict[str, Reference]] = {
    "gated_mla": {"self_attn": gated_mla, "mlp": gated_shared_moe},
    "biased": {"self_attn": biased_attention, "mlp": biased_moe, "": layer_norm_layer},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_an_example(name: str, tmp_path: Path) -> None:
    model = built(name, tmp_path)
    tokens = torch.randint(500, (BATCH, SEQ + 1), generator=torch.manual_seed(1))
    blocks_compute_what_torch_does(model, tokens, REFERENCES[name])
    gradients_are_those_of_autograd(model, tokens)
    a_decoder_scores_the_same(model, tokens)
    again = type(model)(dtype=torch.float64, seed=9)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def blocks_compute_what_torch_does(
    model: Any, tokens: Tensor, references: dict[str, Reference]
) -> None:
    """Of what the last layer gives a block, its first result."""
    layer = model.model.layers[-1]
    seen: dict[str, Any] = {}
    for path in references:
        hook = partial(_note, seen, path)
        layer.get_submodule(path).register_forward_hook(hook)
    model(tokens)
    for path, reference in references.items():
        x, made = seen[path]
        weights = layer.get_submodule(path).state_dict()
        close(made[0] if isinstance(made, tuple) else made, reference(weights, x))


def _note(seen: dict[str, Any], path: str, block: Any, given: Any, made: Any) -> None:
    seen[path] = given[0], made


def gradients_are_those_of_autograd(model: Any, tokens: Tensor) -> None:
    """Of the generated backward pass against torch's through `forward`."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    weights = dict(model.named_parameters())
    loss = torch_f.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    expected = torch.autograd.grad(loss, [*weights.values()])
    found = model.loss(inputs, labels)
    found.total.backward()
    close(found.total, loss)
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        assert weight.grad is not None and weight.grad.count_nonzero(), name
        close(weight.grad, gradient)


def a_decoder_scores_the_same(model: Any, tokens: Tensor) -> None:
    """A prompt, and then token by token with a cache, against the whole text at once."""
    cache = importlib.import_module(f"{type(model).__module__.split('.')[0]}.runtime.cache")
    kept, scores = cache.Cache(BATCH, SEQ), model(tokens).logits
    for start, end in ((0, 4), *((i, i + 1) for i in range(4, SEQ))):
        step = model.prefill if end - start > 1 else model.decode
        position = torch.arange(start, end).expand(BATCH, -1)
        close(step(tokens[:, start:end], position, kept), scores[:, end - 1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
