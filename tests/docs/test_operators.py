"""docs/operators.md, followed to the letter: its operator computes, and has a derivative."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.pipeline import compile
from tests.support.cases import Case, close
from tests.support.documents import examples
from tests.support.models import GQA, description, model
from tests.support.places import ROOT

TEXT = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
# The tables that the page adds entries to, by file; a class or a function is added as it stands.
ENTRIES = {
    "backends/torch/statements.py": "STATEMENTS",
    "tests/interpret/operators.py": "RUN",
    "compiler/lower/forms.py": "FORMS",
    "tests/compiler/ops/test_gradients.py": "EXAMPLES",
}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Puts each piece in the file that the text before it names; the functions and classes."""
    made: dict[str, Any] = {}
    before, *rest = re.split(r"^```python\n", TEXT, flags=re.M)
    for part in rest:
        code, after = part.split("```\n", 1)
        named = re.findall(r"`([\w/]+\.py)`", before.rsplit("\n\n", 2)[-2])
        file = next((f for f in named if f in ENTRIES), named[0])
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        if file in ENTRIES:
            entry = eval(f"{{{code}}}", vars(module))
            for key, value in entry.items():
                monkeypatch.setitem(getattr(module, ENTRIES[file]), key, value)
        else:
            scope: dict[str, Any] = {}
            exec("from __future__ import annotations\n" + code, vars(module) | scope, scope)
            for key in scope.keys() - {"annotations"}:
                monkeypatch.setattr(module, key, scope[key], raising=False)
                made[key] = scope[key]
        before = after
    monkeypatch.setitem(importlib.import_module("compiler.ops").OPS, "softcap", made["Softcap"])
    return made


@pytest.fixture
def sets(added: dict[str, Any], tmp_path: Path) -> tuple[str, ...]:
    """A spec whose layers have the block of the page."""
    (block,) = (e.text for e in examples(TEXT) if e.text.startswith("block "))
    (tmp_path / "softcap.dsl").write_text(block, encoding="utf-8")
    use = [one.replace("SwiGLU", "Softcap") for one in GQA]
    use[0] = f"blocks=[causal_lm, decoder, gqa, '{tmp_path / 'softcap.dsl'}']"
    return tuple(use)


@pytest.mark.slow
def test_the_block_computes_what_torch_does(
    added: dict[str, Any], sets: tuple[str, ...], tmp_path: Path
) -> None:
    built = model(tmp_path, *sets)
    package = type(built).__module__.split(".", 1)[0]
    # The copy of `runtime/` in the package is made from the file, which is as it was.
    importlib.import_module(f"{package}.runtime.functional").__dict__.update(added)
    block = built.model.layers[0].mlp
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    up = 30 * torch.tanh(x @ block.up_proj.weight.T / 30)
    torch.testing.assert_close(block(x), up @ block.down_proj.weight.T)


@pytest.mark.slow
def test_its_gradients_are_those_of_autograd(sets: tuple[str, ...]) -> None:
    case = Case(description(*sets))
    found = case.gradients(compile(case.description).programs["train"])
    expected = case.gradients(case.lowered)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name], name)
