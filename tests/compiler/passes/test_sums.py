"""Sums over tokens: no part of scores, which a decoder makes of the new tokens alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.pipeline import compile
from dsl.diagnostic import DiagnosticError
from tests.support.models import GQA, description

BLOCK = """
block Summed(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  y = linear(x, to = hidden_size, name = proj)
  {line}
"""
BY_TOKENS = [
    "return y * sum(y)",
    "return y + sequence_balance_loss(softmax(y), k = 1)",
]
FINE = [
    "return y * sum(parameter(hidden_size, name = p.scale, init = 1))",
    "collect balance = sum(float32(y))\n  return y",
]


def compiled(folder: Path, line: str) -> None:
    path = folder / "summed.dsl"
    path.write_text(BLOCK.format(line=line), encoding="utf-8")
    sets = [s.replace("feed_forward: SwiGLU", "feed_forward: Summed") for s in GQA]
    sets[0] = sets[0].replace("]", f", '{path}']")
    sets[1] = sets[1].replace(", intermediate_size: 8", "")
    sets[3] = "train={loss: {balance_alpha: 1}}"
    compile(description(*sets))


@pytest.mark.parametrize("line", BY_TOKENS)
def test_scores_that_depend_on_all_tokens_are_refused(line: str, tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as raised:
        compiled(tmp_path, line)
    (found,) = raised.value.diagnostics
    assert found.code == "E412" and "new ones only" in found.message
    assert found.span and found.span.text in line


@pytest.mark.parametrize("line", FINE)
def test_sums_of_weights_and_losses_are_not(line: str, tmp_path: Path) -> None:
    compiled(tmp_path, line)
