"""Free parameters: which of them weight decay applies to."""

from __future__ import annotations

from pathlib import Path

from compiler.lower import lower
from tests.support.models import GQA, description

BLOCK = """
block Scaled(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  let heads = 2
  let width = hidden_size // heads
  y = unflatten(linear(x, to = hidden_size, name = proj), heads, width)
  y = y * parameter(heads, 1, name = scale.p, init = 1)
  y = y + parameter(heads, width, name = table.p, init = 0, std = 0.02, decay = true)
  return linear(flatten(y, heads, width), to = hidden_size, name = out)
"""


def test_a_parameter_decays_where_its_block_says_so(tmp_path: Path) -> None:
    path = tmp_path / "scaled.dsl"
    path.write_text(BLOCK, encoding="utf-8")
    sets = [s.replace("feed_forward: SwiGLU", "feed_forward: Scaled") for s in GQA]
    sets[0] = sets[0].replace("]", f", '{path}']")
    sets[1] = sets[1].replace(", intermediate_size: 8", "")
    weights = lower(description(*sets)).graphs["Scaled"].weights
    assert {name: weight.decay for name, weight in weights.items()} == {
        "proj.weight": True, "scale.p": False, "table.p": True, "out.weight": True,
    }  # fmt: skip
