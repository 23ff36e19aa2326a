"""The files of a build, as people will read them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from backends.build import compiled_step
from backends.cpp.emit import Unsupported
from backends.torch.model import model_py
from compiler.ops import OPS
from compiler.pipeline import compile
from dsl.load import load
from tests.support.generated import CASES, described, generated
from tests.support.golden import Golden
from tests.support.places import SPECS


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_model_and_config(case: str, golden: Golden) -> None:
    files = generated(case)
    golden(f"generated/{case}.model.py.txt", files["model.py"])
    if case.startswith("deepseek_v3"):
        golden(f"generated/{case}.config.py.txt", files["config.py"])
    if case == "deepseek_v3":
        golden(f"generated/{case}.stages.py.txt", files["stages.py"])


@pytest.mark.slow
def test_step_in_cpp(golden: Golden) -> None:
    """What it binds is listed in Python, layer by layer."""
    files = compiled_step(*described("deepseek_v3_tiny"))
    golden("generated/deepseek_v3_tiny.step.cpp.txt", files["cpu/step.cpp"])
    golden("generated/deepseek_v3_tiny.cpu.py.txt", files["cpu/__init__.py"])
    assert all(len(line) <= 100 for line in files["cpu/step.cpp"].splitlines())
    ast.parse(files["cpu/__init__.py"])


@pytest.mark.slow
def test_operators_without_cpp_are_named() -> None:
    description = load(SPECS / "dots_llm1.yaml")
    with pytest.raises(Unsupported, match=r"rms_norm of .* \(gqa_norm\.dsl:\d+\)"):
        compiled_step(description, compile(description))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_generated_is_clean(case: str, tmp_path: Path) -> None:
    """No unused or missing name, no line over 100 columns; no branch but on `saved`."""
    files = generated(case)
    for name in ("__init__.py", "model.py", "config.py", "stages.py"):
        if name not in files:
            continue
        (tmp_path / name).write_text(files[name])
        for node in ast.walk(ast.parse(files[name])):
            assert not isinstance(node, ast.Try | ast.Assert), "a branch on what is known"
            if isinstance(node, ast.If):
                assert ast.unparse(node.test) in ("saved is None", "saved is not None")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W", "--line-length",
         "100", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_products_that_may_wait_are_written_where_their_operands_are() -> None:
    """Wherever they are added: by then a name of theirs may belong to another value."""
    description, compiled = described("dense_gqa_tied")
    texts = []
    for _ in range(2):
        names = {"about": "", "spec": "", "version": "", "dtype": "float32"}
        texts.append(model_py(compiled, **names, params=description.params))
        for graph in compiled.programs["train"].graphs.values():
            products = {op.result for op in graph.walk() if OPS[op.kind].weight_product}
            late = [op for op in graph.ops if op.operands and op.operands[0] in products]
            rest = [op for op in graph.ops if op not in late]
            graph.ops[:] = [*rest[:-1], *late, rest[-1]]
    assert texts[0] == texts[1] and "grads.defer(" in texts[0]
