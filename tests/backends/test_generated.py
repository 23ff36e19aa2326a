"""The files of a build, as people will read them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from backends.build import package
from compiler.analysis import summary
from compiler.pipeline import compile
from dsl.load import load
from tests.support.golden import Golden
from tests.support.places import SPECS

SMALL = [
    "params={vocab_size: 32, hidden_size: 8, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 4, intermediate_size: 8, tie_word_embeddings: true}",
    "blocks=[causal_lm, decoder, gqa, swiglu]",
    "architecture={layers: [{repeat: 2, attention: GQA, feed_forward: SwiGLU}]}",
    "train={}",
]
CASES: dict[str, tuple[str, list[str]]] = {
    "deepseek_v3": ("deepseek_v3", []),
    "deepseek_v3_tiny": ("deepseek_v3_tiny", []),
    "deepseek_v2_lite": ("deepseek_v2_lite", []),
    "dense_gqa_tied": ("deepseek_v3_tiny", SMALL),
}


def generated(case: str) -> dict[str, str]:
    spec, sets = CASES[case]
    description = load(SPECS / f"{spec}.yaml", sets=sets)
    compiled = compile(description)
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    return {name: data.decode() for name, data in package(description, compiled, numbers).items()}


@pytest.mark.parametrize("case", CASES)
def test_model_and_config(case: str, golden: Golden) -> None:
    files = generated(case)
    golden(f"generated/{case}.model.py.txt", files["model.py"])
    if case.startswith("deepseek_v3"):
        golden(f"generated/{case}.config.py.txt", files["config.py"])


@pytest.mark.parametrize("case", CASES)
def test_what_is_generated_is_clean(case: str, tmp_path: Path) -> None:
    """No unused or missing name, no line over 100 columns but for a remark; no known branch."""
    files = generated(case)
    for name in ("__init__.py", "model.py", "config.py"):
        (tmp_path / name).write_text(files[name])
        for node in ast.walk(ast.parse(files[name])):
            assert not isinstance(node, ast.If | ast.Try | ast.Assert), "a branch on what is known"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W", "--line-length",
         "110", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
