"""Functions of a user's file in built models: results, gradients, decoding, experts, ranks."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_f

from backends.build import build
from backends.read import read_build
from compiler.analysis import summary
from compiler.analysis.costs import Costs
from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError, render
from tests.interpret import user
from tests.support.cases import Case, close
from tests.support.externs import BLOCKS, WEIGH, small, with_experts
from tests.support.golden import Golden
from tests.support.models import description, model, published

TOKENS = torch.randint(64, (2, 13), generator=torch.manual_seed(3))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("extern")
    return model(folder, *small(folder))


def package_of(built: Any) -> str:
    return type(built).__module__.split(".", 1)[0]


def runtime_of(built: Any, name: str) -> Any:
    return importlib.import_module(f"{package_of(built)}.runtime.{name}")


def reference(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits of the small model in plain torch."""

    def norm(x: Tensor, name: str) -> Tensor:
        return torch_f.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], 1e-6)

    def project(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def turn(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 16, 2) / 16)
        pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous())
        wave = torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
        return torch.view_as_real(pairs * wave[:, None]).flatten(-2)

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(2):
        layer = f"model.layers.{i}"
        normed = norm(x, f"{layer}.input_layernorm")
        q, k, v = (
            project(normed, f"{layer}.self_attn.{n}_proj").unflatten(-1, (2, 16)) for n in "qkv"
        )
        o = user.differential(turn(q), turn(k), v, 0.3).flatten(-2)
        x = x + project(o, f"{layer}.self_attn.o_proj")
        up = project(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp.up_proj")
        x = x + project(user.squash(up, 0.5), f"{layer}.mlp.down_proj")
    return project(norm(x, "model.norm"), "lm_head")


@pytest.mark.slow
def test_training_is_that_of_a_reference(built: Any) -> None:
    weights = {t.name: t.tensor.clone().requires_grad_() for t in published(built)}
    logits = reference(weights, TOKENS[:, :-1])
    expected = torch_f.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    expected.backward()
    built.zero_grad()
    loss = built.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total
    loss.backward()
    # The table of rotary embedding is in float32.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for tensor in published(built):
        gradient = weights[tensor.name].grad
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_a_decoder_computes_what_whole_sequences_give(built: Any) -> None:
    tokens = TOKENS[:, :-1]
    whole = built(tokens).logits
    position = torch.arange(12).expand(2, -1)
    cache = runtime_of(built, "cache").Cache(2, 12)
    found = [built.prefill(tokens[:, :5], position[:, :5], cache)]
    found += [
        built.decode(tokens[:, i : i + 1], position[:, i : i + 1], cache) for i in range(5, 12)
    ]
    torch.testing.assert_close(torch.stack(found, 1), whole[:, 4:])


@pytest.mark.slow
def test_pages_hand_each_sequence_to_the_function_by_itself(built: Any) -> None:
    pages_of = runtime_of(built, "pages")
    pages = pages_of.Pages(12, 4)
    tokens, blocks = TOKENS[:, :-1], [[3, 1, 7, 5], [2, 9, 4, 6]]
    whole = built(tokens).logits
    steps = [[(0, 6), (0, 4)], [(6, 1), (4, 1)], [(7, 5), (5, 2)]]
    for step in steps:
        rows = [(blocks[i], first, new) for i, (first, new) in enumerate(step)]
        counts = [new for _, new in step]
        made, position = pages_of.make_rows(rows, [counts[0] - 1, sum(counts) - 1], 4)
        pages.begin(made)
        given = torch.cat([tokens[i, first : first + new] for i, (first, new) in enumerate(step)])
        scores = built.decode(given[None], position, pages)
        ends = [whole[i, first + new - 1] for i, (first, new) in enumerate(step)]
        torch.testing.assert_close(scores, torch.stack(ends))


@pytest.mark.slow
@pytest.mark.parametrize("make", [small, with_experts])
def test_all_programs_mean_the_same(make: Any, tmp_path: Path) -> None:
    """Passes rewrite around a function as around any operator, derivatives included."""
    case = Case(description(*make(tmp_path)))
    programs = compile(case.description).programs
    expected = case.gradients(case.lowered)
    for name, gradient in case.gradients(programs["train"]).items():
        close(gradient, expected[name], name)
    whole = case.observe(programs["forward"])
    for name in ("prefill", "decode"):
        for key, value in case.observe(programs[name]).items():
            close(value, whole[key], key)


@pytest.mark.slow
def test_experts_with_a_function_are_grouped(tmp_path: Path) -> None:
    program = compile(description(*with_experts(tmp_path))).programs["forward"]
    kinds = [op.kind for graph in program.graphs.values() for op in graph.walk()]
    assert "experts" not in kinds and kinds.count("extern") == 2


@pytest.mark.slow
def test_fp8_is_placed_around_a_function_which_stays_in_bf16(tmp_path: Path) -> None:
    sets = [*with_experts(tmp_path), "precision.policy=fp8_blockwise"]
    for program in compile(description(*sets)).programs.values():
        for graph in program.graphs.values():
            for op in graph.walk():
                if op.kind.startswith("extern"):
                    assert {v.type.dtype for v in (*op.operands, *op.results)} == {"bf16"}
                    made = {o.kind for o in graph.walk() if set(o.operands) & set(op.results)}
                    assert any("quantize" in kind or "linear" in kind for kind in made)


@pytest.mark.slow
def test_flops_are_those_that_the_block_declares(tmp_path: Path) -> None:
    compiled = compile(description(*small(tmp_path)))
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    assert numbers.parameters == 2 * 64 * 32 + 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64 + 64)
    for name, keys in [("forward", 10), ("decode", 200)]:
        program = compiled.programs[name]
        graph = program.graphs["Differential"]
        (op,) = (o for o in graph.ops if o.kind == "sequence_extern")
        costs = Costs(program).of(graph, {"batch": 2, "seq": 10, "context": 200})
        assert costs[op].flops == 20 * (2 * 2 * (16 + 2 * 16) * keys / 2)


@pytest.mark.slow
def test_a_gradient_of_the_users_own(tmp_path: Path) -> None:
    block = """
block Weighed(x: [.., hidden_size]) -> [.., hidden_size]:
  params hidden_size
  let wide = hidden_size + 1
  up = linear(x, to = wide, name = up_proj)
  z, most = weigh(up, linear(x, to = hidden_size, name = gate_proj), limit = 2)
  return linear(z, to = hidden_size, name = down_proj)
"""
    sets = small(tmp_path)
    path = tmp_path / "weigh.dsl"
    path.write_text(WEIGH + block, encoding="utf-8")
    sets[0] = sets[0].replace("]", f", '{path}']")
    sets[2] = sets[2].replace("SquashMLP", "Weighed")
    made = model(tmp_path, *sets)
    assert importlib.import_module(f"{package_of(made)}.extern").weigh.gradient is not None
    made.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total.backward()
    found = {n: p.grad.clone() for n, p in made.named_parameters()}
    made.zero_grad()
    logits = made(TOKENS[:, :-1]).logits
    torch_f.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


@pytest.mark.slow
def test_a_decoder_refuses_what_it_could_not_remember(tmp_path: Path, golden: Golden) -> None:
    told = []
    for old, new in [
        ("k, v = cache(k, v)", "v = cache(v)"),
        ("[batch, context, heads, value]", "[batch, seq, heads, value]"),
    ]:
        text = BLOCKS.replace(old, new)
        if "[batch, seq, heads, value]," in text or new.startswith("["):
            text = text.replace("[batch, context, heads, dim]", "[batch, seq, heads, dim]")
            text = text.replace("  k, v = cache(k, v)\n", "").replace("* context", "* seq")
        with pytest.raises(DiagnosticError) as raised:
            compile(description(*small(tmp_path, text)))
        assert {d.code for d in raised.value.diagnostics} == {"E412"}
        told.append(render(raised.value.diagnostics).replace(f"{tmp_path}/", ""))
    golden("errors/E412_extern.txt", "\n".join(told))


def test_documents_are_masked_by_functions_that_know_positions_only(tmp_path: Path) -> None:
    sets = [*small(tmp_path), "sequence.eos_token_id=1", "train.document_mask=true"]
    with pytest.raises(DiagnosticError) as raised:
        compile(description(*sets))
    assert "tell documents apart" in raised.value.diagnostics[0].message


@pytest.mark.slow
def test_a_build_reads_the_file_and_does_not_run_it(tmp_path: Path) -> None:
    """Nor does text of a spec become code; names of files and functions clash with nothing."""
    sets = small(tmp_path)
    text = """
extern lambda(x: [.., n]) -> [.., n]:
  params mode = "x"
  file = "keyword.py"
  function = "apply"
  per = "token"
  flops = 0

extern keyword(x: [.., n]) -> [.., n]:
  file = "keyword.py"
  function = "apply"
  per = "token"
  flops = 0

block E(x: [.., hidden_size]) -> [.., hidden_size]:
  params hidden_size, mode = "y"
  y = linear(lambda(x, mode = mode), to = hidden_size, name = down_proj)
  E = keyword(lambda(y))
  return E
"""
    (tmp_path / "keyword.py").write_text("def apply(x, mode='a'):\n    return x\n\n1 / 0\n")
    (tmp_path / "e.dsl").write_text(text, encoding="utf-8")
    sets[0] = sets[0].replace("]", f", '{tmp_path / 'e.dsl'}']")
    sets[2] = sets[2].replace("SquashMLP", '"E(mode=mode)"')
    sets[1] = sets[1].replace("}", """, mode: '") + open(1) # {{ 1 }}'}""")
    result = build(description(*sets), tmp_path / "guarded")
    assert result.user_code == ["extern/keyword.py", "extern/user.py"]
    made = (tmp_path / "guarded" / "extern" / "__init__.py").read_text(encoding="utf-8")
    assert [a.targets[0].id for a in ast.parse(made).body if isinstance(a, ast.Assign)] == [  # type: ignore[attr-defined]
        "attend_twice", "lambda_2", "keyword_2",
    ]  # fmt: skip
    assert "open" not in {n.id for n in ast.walk(ast.parse(made)) if isinstance(n, ast.Name)}
    ast.parse((tmp_path / "guarded" / "model.py").read_text(encoding="utf-8"))
    assert read_build(tmp_path / "guarded").programs.keys() >= {"decode"}
    with pytest.raises(ZeroDivisionError):
        sys.path.insert(0, str(tmp_path))
        importlib.import_module("guarded")


@pytest.mark.slow
def test_stages_call_functions_too(tmp_path: Path) -> None:
    cluster = "parallel={cluster: h200_8, pipeline: 2, expert: 2, batch: 8, sequence_length: 16}"
    result = build(description(*with_experts(tmp_path), cluster), tmp_path / "staged")
    assert "stages.py" in result.files
    texts = [p.read_text() for p in (tmp_path / "staged" / "graph").glob("rank-*.graph")]
    assert any("extern_grad" in t and "arrived@" in t for t in texts)
    stages = (tmp_path / "staged" / "stages.py").read_text(encoding="utf-8")
    assert "from . import extern as E" in stages and "E.squash.grad(" in stages
