"""Windows, masks and capped scores: built models against plain torch, in training and decoding."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from backends.build import build
from dsl.load import load
from runtime import functional
from tests.support.attention import Layer, logits
from tests.support.models import published

MASKED = '''
block Masked(x: [batch, seq, hidden_size], position: i64[batch, seq]) -> [batch, seq, hidden_size]:
  """Blocks of 4 tokens, every third token of the window, and the first ones."""
  params hidden_size, num_attention_heads, head_dim, sinks, reach
  params near = true  # what is known of a mask when the model is built is not in it
  let width = num_attention_heads * head_dim
  q = linear(x, to = num_attention_heads * head_dim, name = q_proj)
  k = linear(x, to = num_attention_heads * head_dim, name = k_proj)
  v = unflatten(linear(x, to = width, name = v_proj), num_attention_heads, head_dim)
  cos, sin = rope_table(position, dim = head_dim, theta = 10000)
  q = rotate(unflatten(q, num_attention_heads, head_dim), cos, sin)
  k = rotate(unflatten(k, num_attention_heads, head_dim), cos, sin)
  k, v = cache(k, v)
  o = attention(q, k, v, position, scale = head_dim ** -0.5,
    mask = q // 4 == k // 4 or k < (sinks if near else q) + 0 or not (near or q < 5) or
      q - k < reach and not (q - k) % 3 != 0)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj)
'''
SPEC = """
model: {name}
blocks: [causal_lm, decoder, mla, capped_gqa, swiglu, mtp, ./masked.dsl]
params: {{vocab_size: 96, hidden_size: 32, intermediate_size: 48, num_attention_heads: 4, {params}}}
architecture:
  layers: [{{repeat: 1, {first}}}, {{repeat: 1, {second}}}]
  mtp: {{depth: 1, {first}}}
sequence: {{max_position_embeddings: 128, eos_token_id: 1}}
precision: {{policy: fp32}}
train: {{document_mask: {mask}, loss: {{mtp_weight: 0.3}}}}
"""
LATENT = (
    "q_lora_rank: 16, kv_lora_rank: 12, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 6"
)


@dataclass(frozen=True)
class Kind:
    params: str
    attention: tuple[str, str]
    """Of the two layers; the MTP module has that of the first."""
    layers: tuple[Layer, Layer]
    documents: bool = False
    """Whether there is a mask between documents."""


KINDS = {
    "window of latents": Kind(
        LATENT, ("MLA(window=5)", "MLA"), (Layer(lambda q, k: q - k < 5), Layer())
    ),
    "capped": Kind(
        "head_dim: 8, num_key_value_heads: 2, softcap: 0.5",
        ("CappedGQA(window=3)", "CappedGQA"),
        (Layer(lambda q, k: q - k < 3, 0.5), Layer(softcap=0.5)),
    ),
    "mask": Kind(
        "head_dim: 8, sinks: 2",
        ("Masked(reach=10)", "Masked(reach=1)"),
        (
            Layer(lambda q, k: q // 4 == k // 4 or k < 2 or (q - k < 10 and (q - k) % 3 == 0)),
            Layer(lambda q, k: q // 4 == k // 4 or k < 2),
        ),
        documents=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    kind: Kind
    model: Any

    def reference(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores by plain torch, and the weights that they are made of."""
        weights = {one.name: one.tensor.clone().requires_grad_() for one in published(self.model)}
        p, layers = self.model.config.params, list(self.kind.layers)
        return logits(weights, p, layers, tokens, position), weights


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """In float64, with weights whose scores differ."""
    folder, kind = tmp_path_factory.mktemp("attention"), KINDS[request.param]
    name = f"attention_{len(sys.modules)}"
    first, second = (f"attention: {one}, feed_forward: SwiGLU" for one in kind.attention)
    mask = "true" if kind.documents else "false"
    spec = SPEC.format(name=name, params=kind.params, first=first, second=second, mask=mask)
    (folder / "masked.dsl").write_text(MASKED)
    (folder / "spec.yaml").write_text(spec)
    build(load(folder / "spec.yaml"), folder / name)
    sys.path.insert(0, str(folder))
    model = importlib.import_module(name).Model(dtype=torch.float64, seed=3)
    sys.path.remove(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return Made(kind, model)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed))


DOCUMENTS = torch.cat([torch.arange(n) for n in (7, 1, 13)]).unsqueeze(0)
"""Positions of three documents, one behind another."""


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-6 * expected.norm())


@pytest.mark.slow
def test_scores_and_gradients_are_those_of_plain_torch(made: Made) -> None:
    position = DOCUMENTS if made.kind.documents else torch.arange(21).expand(2, -1)
    tokens, labels = random(*position.shape), random(*position.shape, seed=1)
    expected, weights = made.reference(tokens, position)
    with torch.no_grad():
        assert close(made.model(tokens, position).logits, expected)
    loss = cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss.backward()
    made.model.zero_grad()
    found = made.model.loss(tokens, labels, position)
    assert close(found.main, loss)
    found.main.backward()
    used = [one for one in published(made.model) if weights[one.name].grad is not None]
    assert len(used) > 15
    assert all(close(one.grad, weights[one.name].grad) for one in used)


@pytest.mark.slow
def test_gradients_of_all_losses_are_those_that_autograd_gives(made: Made) -> None:
    """With the MTP module's, through the plain torch of `forward`."""
    position = DOCUMENTS if made.kind.documents else torch.arange(21).expand(2, -1)
    tokens, labels = random(*position.shape), random(*position.shape, seed=1)
    scores = made.model(tokens, position)
    main = cross_entropy(scores.logits.flatten(0, 1), labels.flatten())
    later = cross_entropy(
        scores.mtp_logits[0].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    total = main + 0.3 * later / labels.numel()
    expected = torch.autograd.grad(total, [*made.model.parameters()])
    made.model.zero_grad()
    found = made.model.loss(tokens, labels, position).total
    assert close(found, total)
    found.backward()
    pairs = zip(made.model.parameters(), expected, strict=True)
    assert all(close(parameter.grad, gradient) for parameter, gradient in pairs)


@pytest.mark.slow
def test_a_decoder_scores_as_the_forward_pass(made: Made) -> None:
    """A prompt in two parts, the second behind keys that are cached, then token by token."""
    tokens, position = random(2, 24), torch.arange(24).expand(2, -1)
    expected, _ = made.reference(tokens, position)
    runtime = f"{type(made.model).__module__.split('.')[0]}.runtime"
    cache = importlib.import_module(f"{runtime}.cache").Cache(2, 24)
    with torch.no_grad():
        for first, last in [(0, 9), (9, 16), *((i, i + 1) for i in range(16, 24))]:
            run = made.model.decode if last == first + 1 else made.model.prefill
            found = run(tokens[:, first:last], position[:, first:last], cache)
            assert close(found, expected[:, last - 1])


@pytest.mark.slow
def test_requests_to_a_server_give_the_same_bits_in_any_company(made: Made) -> None:
    """By pages, with a cache of prefixes, prompts in parts and drafts; and those of the forward
    pass."""
    runtime = f"{type(made.model).__module__.split('.')[0]}.runtime.serve"
    engine, options, request = (
        importlib.import_module(f"{runtime}.{name}") for name in ("engine", "options", "request")
    )
    prompts = [random(n, seed=n).tolist() for n in (1, 9, 17, 30)]
    prompts.append(prompts[-1][:20] + prompts[1])

    def answers(groups: list[list[int]], **given: Any) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        server = engine.Engine(made.model, options.Options(page=4, **given))
        for group in groups:
            for i in group:
                sampling = request.Sampling(max_tokens=6, logprobs=0)
                server.add(str(i), prompts[i], sampling)
            while server.busy:
                for event in server.step():
                    found.setdefault(event.id, []).extend(event.tokens)
        return found

    alone = answers([[i] for i in range(5)], prefix_cache=False, max_requests=1)
    assert answers([[3], [0, 1, 2, 4]], step_tokens=11) == alone
    assert answers([[*range(5)]], step_tokens=23, speculate=1) == alone
    for i, prompt in enumerate(prompts):
        text = torch.tensor([[*prompt, *(token.id for token in alone[str(i)])]])
        with torch.no_grad():
            scores = made.model(text).logits[0, len(prompt) - 1 : -1]
        assert scores.argmax(-1).tolist() == text[0, len(prompt) :].tolist()


def test_no_tokens_have_no_capped_scores() -> None:
    """As MTP modules of texts that are shorter than they look ahead."""
    q, k = torch.zeros(1, 0, 4, 8), torch.zeros(1, 0, 2, 8)
    assert functional.attention(q, k, k, 1.0, softcap=5.0).shape == q.shape
