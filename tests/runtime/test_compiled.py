"""Steps of compiled code: equal to torch's up to rounding, and to themselves bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import compiled, cxx, dispatch
from runtime.matmul import batch_invariant
from runtime.pages import Pages, make_rows
from tests.support.compiled import COMPILER, needs_compiler, package, part, source
from tests.support.models import published
from tests.support.places import ROOT
from tests.support.tiny import Model

PAGE, TEXT = 16, 60
Steps = Any


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return package(tmp_path_factory, "compiled_tiny")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def text() -> list[int]:
    return torch.randint(96, (TEXT,), generator=torch.manual_seed(3)).tolist()


def decoded(steps: Steps, chunks: list[int], others: int = 0) -> tuple[Tensor, ...]:
    """Logits and states of a text in chunks, and logits of drafts if there are MTP modules; beside
    rows of other texts."""
    model = steps.model if isinstance(steps, compiled.CompiledModel) else steps
    pages, tokens = Pages(2 + TEXT // PAGE + others, PAGE), text()
    blocks = list(range(1, 2 + TEXT // PAGE))
    found: list[tuple[Tensor, ...]] = []
    start = 0
    with torch.inference_mode(), batch_invariant():
        for new in chunks:
            company = [([len(blocks) + 1 + i], 0, 1) for i in range(others)]
            rows, position = make_rows(
                [*company, (blocks, start, new)], range(others, others + new), PAGE
            )
            pages.begin(rows)
            given = torch.tensor([[*range(others), *tokens[start : start + new]]])
            logits = steps.decode(given, position, pages)
            assert not pages.broken.any()
            found.append((logits, pages.states[0, others:]))
            for i, offset in enumerate(model.draft_offsets):
                pages.begin(rows)
                drafts = steps.drafter(i)(pages.states, given, position + offset, pages)
                found[-1] = (*found[-1], drafts)
            start += new
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.mark.slow
@needs_compiler
def test_a_step_gives_what_torch_gives_and_the_same_bits_in_any_company(tiny: ModuleType) -> None:
    model = tiny.Model(seed=1)
    steps = compiled.served(model)
    assert isinstance(steps, compiled.CompiledModel)
    expected = decoded(model, [20, 1, 1, 5, 33])
    found = decoded(steps, [20, 1, 1, 5, 33])
    assert close(found, expected)
    assert torch.equal(found[0].argmax(-1), expected[0].argmax(-1))
    for chunks, others, threads in (
        ([60], 0, 1), ([1] * 60, 0, 1), ([3] * 20, 5, 1), ([7] * 8 + [4], 2, 3), ([2] * 30, 1, 2),
    ):  # fmt: skip
        torch.set_num_threads(threads)
        for ours, same in zip(decoded(steps, chunks, others), found, strict=True):
            assert torch.equal(ours, same)


@pytest.mark.slow
@needs_compiler
def test_weights_are_read_where_they_lie(tiny: ModuleType) -> None:
    model = tiny.Model(seed=1)
    steps = compiled.served(model)
    before = decoded(steps, [TEXT])
    other = tiny.Model(seed=2)
    model.load_state_dict(other.state_dict())
    changed = decoded(steps, [TEXT])
    assert not torch.equal(before[0], changed[0])
    assert torch.equal(changed[0], decoded(compiled.served(other), [TEXT])[0])
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)  # at another place
    assert not decoded(steps, [TEXT])[0].any()
    model.lm_head.weight.data = model.lm_head.weight.data.double()
    with pytest.raises(cxx.NotCompiled, match=r"lm_head\.weight is float64"):
        decoded(steps, [TEXT])


@pytest.mark.slow
@needs_compiler
def test_tokens_and_positions_that_there_are_none_of_are_refused(tiny: ModuleType) -> None:
    steps: Steps = compiled.served(tiny.Model(seed=1))
    rows, position = make_rows([([1], 0, 1)], [0], PAGE)
    for token, place in ((96, 0), (-1, 0), (0, 257), (0, -1)):
        pages = Pages(2, PAGE)
        pages.begin(rows)
        with pytest.raises(ValueError, match="tokens must be from 0 to 95 and positions from 0 to"):
            steps.decode(torch.tensor([[token]]), position + place, pages)


@pytest.mark.slow
@needs_compiler
def test_bfloat16_weights_are_widened(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Against the float32 model of the same weights: only what the cache holds is rounded."""
    built = package(tmp_path_factory, "compiled_bf16", "precision.policy=bf16")
    model = built.Model(seed=1)
    exact = built.Model(dtype=torch.float32)
    exact.load_state_dict(model.state_dict())
    steps = compiled.served(model)
    assert isinstance(steps, compiled.CompiledModel)
    found, expected = decoded(steps, [7, 1, 52]), decoded(exact, [7, 1, 52])
    for ours, reference, torchs in zip(found, expected, decoded(model, [7, 1, 52]), strict=True):
        error = (ours - reference).norm() / reference.norm()
        assert error < 1e-2 and error < 0.5 * (torchs - reference).norm() / reference.norm()
    for ours, same in zip(decoded(steps, [1] * 60), found, strict=True):
        assert torch.equal(ours, same)


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Up to other orders of sums: float32 has 24 bits, 2.4e-7 of the largest state is one."""
    pairs = zip(found, expected, strict=True)
    return all((a - b).abs().max() <= 2e-6 * b.abs().max() for a, b in pairs)


def dequantized(held: Any, built: ModuleType, like: Any) -> Any:
    """`like`, a float32 model, of the numbers that the quantized weights of another stand for."""
    fp8 = part(built, "fp8")
    values = {one.name: one for one in part(built, "weights").published(held)}
    for one in published(like):
        held_one, numbers = values[one.name], values[one.name].tensor.float()
        if held_one.dtype == torch.float8_e4m3fn:
            numbers = fp8.dequantize_weight(held_one.tensor, held_one.scales)
        elif held_one.scales is not None:
            numbers = numbers * held_one.scales
        one.take(numbers)
    return like


@pytest.mark.slow
@needs_compiler
def test_fp8_weights_are_widened(
    tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against the float32 model of the same numbers; blocks begin anew in joined weights."""
    built = package(tmp_path_factory, "compiled_fp8", "precision.policy=fp8_blockwise")
    held = built.Model(seed=1, dtype=torch.float32, weights="fp8")
    assert held.model.layers[0].mlp.down_proj.weight.dtype is torch.float8_e4m3fn
    steps = compiled.served(held)
    assert isinstance(steps, compiled.CompiledModel)
    found = decoded(steps, [20, 1, 1, 5, 33])
    exact = dequantized(held, built, tiny.Model())
    assert close(found, decoded(exact, [20, 1, 1, 5, 33]))
    assert not close(found, decoded(tiny.Model(seed=1), [20, 1, 1, 5, 33]))
    for chunks, others in (([60], 0), ([1] * 60, 0), ([3] * 20, 5), ([7] * 8 + [4], 2)):
        for ours, same in zip(decoded(steps, chunks, others), found, strict=True):
            assert torch.equal(ours, same)


def test_what_int8_is_not_for(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.Model(device="meta", weights="int8")
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    for call in (model, model.prefill, model.loss):
        with pytest.raises(ValueError, match="can only be served: nothing but compiled steps"):
            call(tokens, tokens, tokens)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save(tmp_path / "int8")
    with pytest.raises(ValueError, match="weights can be fp8 or int8, not 'int4'"):
        tiny.Model(device="meta", weights="int4")


KEYS = (
    "blocks=[causal_lm, decoder, gqa, capped_gqa, swiglu]",
    "params={vocab_size: 96, hidden_size: 40, num_attention_heads: 10, num_key_value_heads: 2, "
    "head_dim: 12, intermediate_size: 24, softcap: 5, tie_word_embeddings: true}",
    "architecture={layers: [{repeat: 1, attention: CappedGQA(window=9), feed_forward: SwiGLU}, "
    "{repeat: 2, attention: GQA, feed_forward: SwiGLU}]}",
    "train={initializer_range: 0.2}",
)


@pytest.mark.slow
@needs_compiler
def test_heads_attend_to_keys_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """To those of a window, too, by capped scores; the head is the embedding, which int8 is not
    for."""
    built = package(tmp_path_factory, "compiled_keys", *KEYS)
    held = built.Model(seed=1, weights="int8")
    assert held.model.embed_tokens.weight.dtype is torch.float32
    steps = compiled.served(held)
    assert isinstance(steps, compiled.CompiledModel)
    found = decoded(steps, [20, 1, 1, 5, 33])
    assert close(found, decoded(dequantized(held, built, built.Model()), [20, 1, 1, 5, 33]))
    for chunks, others in (([60], 0), ([1] * 60, 2), ([7] * 8 + [4], 5)):
        for ours, same in zip(decoded(steps, chunks, others), found, strict=True):
            assert torch.equal(ours, same)


SANITIZED = """
import torch
from tests.runtime.test_compiled import close, decoded, dequantized
from runtime import compiled, cxx
import compiled_tiny

# Checks of what is not optimized take half the time to compile.
CHECKS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0"
cxx.FLAGS = (*cxx.FLAGS, *CHECKS)
held = compiled_tiny.Model(seed=1, weights="int8")
steps = compiled.served(held)
assert isinstance(steps, compiled.CompiledModel)
torch.set_num_threads(3)
found = decoded(steps, [20, 1, 2, 5, 32], others=3)
exact = dequantized(held, compiled_tiny, compiled_tiny.Model())
assert close(found, decoded(exact, [20, 1, 2, 5, 32]))
print("clean")
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizer is loaded as Linux does it")
def test_sanitizers_find_nothing(tiny: ModuleType) -> None:
    """With weights in int8, whose logits are those of the float32 model of the same numbers."""
    asked = [str(COMPILER), "-print-file-name=libasan.so"]
    library = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("the compiler has no address sanitizer")
    environment = os.environ | {
        "CXX": str(COMPILER),
        "LD_PRELOAD": os.path.realpath(library),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(source(tiny).parents[2])]),
    }
    run = [sys.executable, "-c", SANITIZED]
    done = subprocess.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr


# ---- where there is none -------------------------------------------------------------------------


class WithSource(Model):
    """A model whose build had a compiled step, of C++ that no compiler takes."""

    def decode(self, *inputs: Any) -> Any:  # type: ignore[override]
        return super().decode(*inputs)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    path = tmp_path / "a_model" / "cpu" / "step.cpp"
    path.parent.mkdir(parents=True)
    path.write_text('#error "not this"\n')
    monkeypatch.setattr(WithSource, "compiled", compiled.Source(path, {}))
    monkeypatch.delenv("DSLC_KERNELS", raising=False)
    dispatch.wanted.cache_clear()
    return WithSource(dtype=torch.float32)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no_such_compiler", "there is no compiler no_such_compiler (CXX)"),
        ("false", "false cannot be asked: 1"),
    ],
)
def test_without_a_compiler_torch_serves_and_one_line_says_so(
    model: Model, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert compiled.served(model) is model
    assert capsys.readouterr().err == f"a_model: torch computes its steps: {reason}\n"


def test_no_compiler_on_the_path(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiled.served(model) is model
    assert "there is no C++ compiler (c++, g++, clang++, or CXX)" in capsys.readouterr().err


@needs_compiler
def test_what_cannot_be_compiled_is_told(model: Model, capsys: Any) -> None:
    assert compiled.served(model) is model
    first, second = capsys.readouterr().err.splitlines()
    assert first == "a_model: compiling its step for this CPU, once"
    assert second.startswith("a_model: torch computes its steps: ") and "not this" in second


def test_int8_is_served_by_compiled_steps_or_not_at_all(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model.quantized = "int8"
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(ValueError, match=r"int8.*there is no compiler no_such_compiler \(CXX\)"):
        compiled.served(model)
    monkeypatch.setenv("DSLC_KERNELS", "torch")
    dispatch.wanted.cache_clear()
    with pytest.raises(ValueError, match=r"int8.*torch was asked for"):
        compiled.served(model)
    assert capsys.readouterr().err == ""
    dispatch.wanted.cache_clear()


def test_torch_can_be_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("DSLC_KERNELS", "torch")
    dispatch.wanted.cache_clear()
    assert compiled.served(model) is model and compiled.fingerprint(WithSource) == "torch"
    assert capsys.readouterr().err == ""
    dispatch.wanted.cache_clear()


def test_a_decode_of_ones_own_is_what_is_served(model: Model, capsys: Any) -> None:
    class Own(WithSource):
        def decode(self, *inputs: Any) -> Any:
            return super().decode(*inputs)

    own = Own(dtype=torch.float32)
    assert compiled.served(own) is own and capsys.readouterr().err == ""


def test_other_dtypes_are_torchs(model: Model, capsys: Any) -> None:
    double = WithSource(dtype=torch.float64)
    assert compiled.served(double) is double
    assert capsys.readouterr().err == "a_model: torch computes its steps: weights in float64\n"
