"""Blocks whose equations hold functions of `tests/interpret/user.py`."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.interpret import user

FILE = '  file = "user.py"\n'
SQUASH = f"""
extern squash(x: [.., width]) -> [.., width]:
  \"\"\"|tanh(beta x)|^power.\"\"\"
  params beta = 0.5, power = 2
{FILE}  per = "token"
  flops = 0
"""
WEIGH = f"""
extern weigh(x: [.., width], y: [.., shorter]) -> (z: [.., shorter], most: i64[..]):
  params limit = 3.0
{FILE}  gradient = "weigh_grad"
  per = "token"
  flops = 0
"""
DIFFERENTIAL = f"""
extern attend_twice(
    q: [batch, seq, heads, dim],
    k: [batch, context, heads, dim],
    v: [batch, context, heads, value]
  ) -> [batch, seq, heads, value]:
  params subtracted = 0.3
{FILE}  function = "differential"
  per = "sequence"
  flops = 2 * heads * (dim + 2 * value) * context / 2
"""
MLP = """
block SquashMLP(x: [.., hidden_size]) -> [.., hidden_size]:
  \"\"\"down(squash(up(x))).\"\"\"
  params hidden_size, intermediate_size = 2 * hidden_size
  slots activation = squash

  up = linear(x, to = intermediate_size, name = up_proj)
  return linear(activation(up), to = hidden_size, name = down_proj)
"""
ATTENTION = """
block Differential(
    x: [batch, seq, hidden_size], position: i64[batch, seq]
  ) -> [batch, seq, hidden_size]:
  params hidden_size, num_attention_heads, head_dim = 16, rope_theta = 10000

  let all = num_attention_heads * head_dim
  cos, sin = rope_table(position, dim = head_dim, theta = rope_theta)
  q = rotate(unflatten(linear(x, to = all, name = q_proj), num_attention_heads, head_dim), cos, sin)
  k = rotate(unflatten(linear(x, to = all, name = k_proj), num_attention_heads, head_dim), cos, sin)
  v = unflatten(linear(x, to = all, name = v_proj), num_attention_heads, head_dim)
  k, v = cache(k, v)
  o = attend_twice(q, k, v)
  return linear(flatten(o, num_attention_heads, head_dim), to = hidden_size, name = o_proj)
"""
BLOCKS = SQUASH + DIFFERENTIAL + MLP + ATTENTION


def written(folder: Path, text: str = BLOCKS) -> Path:
    """A block file of this text, with the user's file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(user.__file__, folder / "user.py")
    (folder / "own.dsl").write_text(text, encoding="utf-8")
    return folder / "own.dsl"


def small(folder: Path, text: str = BLOCKS) -> list[str]:
    """Changes that make two layers of these blocks of the tiny spec."""
    path = written(folder, text)
    return [
        f"blocks=[causal_lm, decoder, '{path}']",
        "params={vocab_size: 64, hidden_size: 32, num_attention_heads: 2}",
        "architecture={layers: [{repeat: 2, attention: Differential, feed_forward: SquashMLP}]}",
        "train={}",
    ]


def with_experts(folder: Path) -> list[str]:
    """The tiny spec with latent attention, and `SquashMLP` for dense layers and experts."""
    path = written(folder, SQUASH + MLP + EXPERTS)
    blocks = "causal_lm, decoder, mla, swiglu, deepseek_moe, mtp"
    return [
        f"blocks=[{blocks}, '{path}']",
        "architecture.layers.0.feed_forward=SquashMLP",
        "architecture.layers.1.feed_forward=SquashedExperts",
    ]


EXPERTS = """
block SquashedExperts(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  slots feed_forward = DeepSeekMoE, expert = SquashMLP(intermediate_size = 24)

  return feed_forward(x, expert = expert)
"""
