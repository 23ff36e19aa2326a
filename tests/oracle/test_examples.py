"""Blocks of specs/examples against plain torch: scores, gradients, decoding, serving."""

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
MTP = {"gated_mla", "sparse"}  # examples with MTP modules
SETS = {  # what references leave out, and `forward` does not give
    "sparse": ["params.yarn_factor=1", "params.indexer_loss_weight=0"],
}


def built(name: str, folder: Path) -> Any:
    """A model of specs/examples in float64, with weights large enough to matter."""
    package = f"{name}_{next(COUNTER)}"
    # The loss is that of scores alone.
    sets = ["train.loss.balance_alpha=0", *(["architecture.mtp.depth=0"] if name in MTP else [])]
    sets += SETS.get(name, [])
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


def rotate_halves(x: Tensor) -> Tensor:
    """The same in pairs (i, i + dim / 2)."""
    pairs = rotate(torch.stack(x.chunk(2, -1), -1).flatten(-2))
    return torch.cat([pairs[..., 0::2], pairs[..., 1::2]], -1)


def rotate(x: Tensor) -> Tensor:
    """x [batch, seq, heads, dim] turned by position, in pairs (2i, 2i + 1); angles in float32."""
    frequency = 1 / 10000.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None] * frequency
    turn = torch.complex(angle.cos(), angle.sin()).to(torch.complex128)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Of [batch, seq, heads, dim], causal; heads share keys where there are fewer of them.

    `seen` are further limits, bool [.., query, key]; a sink is one more key, without a value.
    """
    shared = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    limits = torch.ones(q.shape[1], k.shape[1]).tril().bool() & (True if seen is None else seen)
    weight = scores.masked_fill(~limits, -torch.inf).exp()
    total = weight.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return torch.einsum("bhqk,bkhd->bqhd", weight / total, v)


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


def sparse_mla(w: Weights, x: Tensor) -> Tensor:
    heads, nope, rope, topk = 4, 16, 8, 4
    c_q = rms_norm(w, "q_a_layernorm", linear(w, "q_a_proj", x))
    q_nope, q_rope = linear(w, "q_b_proj", c_q).unflatten(-1, (heads, -1)).split([nope, rope], -1)
    c, k_rope = linear(w, "kv_a_proj_with_mqa", x).split([24, rope], -1)
    kv = linear(w, "kv_b_proj", rms_norm(w, "kv_a_layernorm", c)).unflatten(-1, (heads, -1))
    k_nope, v = kv.split([nope, 16], -1)
    k_rope = rotate(k_rope[:, :, None]).expand(-1, -1, heads, -1)
    index_q = linear(w, "indexer.wq_b", c_q).unflatten(-1, (8, 16))
    index_k = linear(w, "indexer.wk", x)
    norm = w["indexer.k_norm.weight"], w["indexer.k_norm.bias"]
    index_k = torch_f.layer_norm(index_k, (16,), *norm, eps=1e-6)[:, :, None]
    index_q, index_k = (
        torch.cat([rotate_halves(t[..., :rope]), t[..., rope:]], -1) for t in (index_q, index_k)
    )
    score = torch.einsum("bqhd,bkd->bqhk", index_q, index_k[:, :, 0]).relu() * 16**-0.5
    score = torch.einsum("bqhk,bqh->bqk", score, linear(w, "indexer.weights_proj", x)) * 8**-0.5
    seen = torch.zeros(BATCH, 1, SEQ + 1, SEQ + 1).bool()[..., : x.shape[1], : x.shape[1]]
    for b, at in itertools.product(range(BATCH), range(x.shape[1])):
        best = sorted(range(at + 1), key=lambda key: -score[b, at, key].item())[:topk]
        seen[b, 0, at, best] = True
    q, k = torch.cat([q_nope, rotate(q_rope)], -1), torch.cat([k_nope, k_rope], -1)
    return linear(w, "o_proj", attend(q, k, v, seen).flatten(-2))


def grouped(w: Weights, x: Tensor, width: int) -> tuple[Tensor, ...]:
    return tuple(linear(w, f"{n}_proj", x).unflatten(-1, (-1, width)) for n in "qkv")


def sink_gqa(w: Weights, x: Tensor) -> Tensor:
    q, k, v = grouped(w, x, 16)
    at = torch.arange(x.shape[1])
    near = at[:, None] - at < 4
    o = attend(rotate_halves(q), rotate_halves(k), v, near, w["attention.sinks"])
    return linear(w, "o_proj", o.flatten(-2))


def differential(w: Weights, x: Tensor) -> Tensor:
    q, k, v = grouped(w, x, 32)
    (q_1, q_2), (k_1, k_2) = q.chunk(2, -1), k.chunk(2, -1)
    first, second = (w[f"difference.q{i}"] @ w[f"difference.k{i}"] for i in (1, 2))
    share = first.exp() - second.exp() + 0.8
    o = attend(rotate(q_1), rotate(k_1), v) - share * attend(rotate(q_2), rotate(k_2), v)
    o = 0.2 * torch_f.rms_norm(o, (32,), w["subln.weight"], eps=1e-5)
    return linear(w, "o_proj", o.flatten(-2))


def native_sparse(w: Weights, x: Tensor) -> Tensor:
    """Query by query and head by head."""
    block, top, window = 4, 2, 4
    q, k, v = grouped(w, x, 16)
    q, k = rotate(q) / 4, rotate(k)
    gates = linear(w, "gate_proj", x).sigmoid().unflatten(-1, (4, 3))
    rows = []
    for b, at in itertools.product(range(BATCH), range(x.shape[1])):
        heads: list[Tensor] = []
        for group in range(2):
            keys, values = k[b, : at + 1, group], v[b, : at + 1, group]
            whole = (at + 1) // block
            means = [
                t[: whole * block].unflatten(0, (whole, block)).mean(1) for t in (keys, values)
            ]
            shares = [(q[b, at, 2 * group + h] @ means[0].T).softmax(-1) for h in range(2)]
            looked = {at // block: torch.inf} | {
                n: sum(share[n].item() for share in shares) for n in range(whole)
                if n != at // block
            }  # fmt: skip
            best = sorted(looked, key=lambda n: -looked[n])[:top]
            chosen = [i for i in range(at + 1) if i // block in best]
            near = range(max(0, at + 1 - window), at + 1)
            for h in range(2):
                query = q[b, at, 2 * group + h]
                parts = [shares[h] @ means[1]]
                parts += [(query @ keys[[*i]].T).softmax(-1) @ values[[*i]] for i in (chosen, near)]
                heads.append(gates[b, at, 2 * group + h] @ torch.stack(parts))
        rows.append(torch.cat(heads))
    return linear(w, "o_proj", torch.stack(rows).unflatten(0, x.shape[:2]))


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
    "sparse": {"self_attn": sparse_mla},
    "sinks": {"self_attn": sink_gqa},
    "differential": {"self_attn": differential},
    "nsa": {"self_attn": native_sparse},
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
    a_server_continues_the_same(model, exact=name != "nsa")  # functions of users do not promise it
    matrices_decay(model)
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
    expected = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    found = model.loss(inputs, labels)
    found.total.backward()
    close(found.total, loss)
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        if gradient is None:  # an indexer learns by a loss of its own
            assert ".indexer." in name and weight.grad is None
            continue
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


def matrices_decay(model: Any) -> None:
    """And no scale or gate, of whatever shape."""
    optimizer = importlib.import_module(
        f"{type(model).__module__.split('.')[0]}.runtime.train.optimizer"
    )
    shapes = dict(model.named_parameters())
    for weight in optimizer.AdamW(model, model.config.train.optimizer).weights:
        matrix = shapes[weight.name].dim() > 1 and not weight.name.endswith("bias")
        assert weight.matrix == (matrix and "head.scale" not in weight.name), weight.name


def a_server_continues_the_same(model: Any, exact: bool) -> None:
    """Prompts together, in parts and by pages, as each of them alone by whole texts; with the bits
    that it has alone if `exact`."""
    runtime = f"{type(model).__module__.split('.')[0]}.runtime.serve"
    engine, options, request = (
        importlib.import_module(f"{runtime}.{name}") for name in ("engine", "options", "request")
    )
    prompts = [torch.randint(2, 500, (n,)).tolist() for n in (3, 11)]

    def answers(*asked: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        server = engine.Engine(model, options.Options(page=4, step_tokens=7))
        for i in asked:
            server.add(str(i), prompts[i], request.Sampling(max_tokens=5, logprobs=0))
        while server.busy:
            for event in server.step():
                found.setdefault(event.id, []).extend(event.tokens)
        return found

    together = answers(0, 1)
    assert not exact or together == answers(0) | answers(1), "bits depend on the company"
    for i, prompt in enumerate(prompts):
        text = torch.tensor([[*prompt, *(token.id for token in together[str(i)])]])
        with torch.no_grad():
            best = model(text).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == text[0, len(prompt) :].tolist()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
