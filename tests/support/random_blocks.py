"""Random blocks: attention and feed-forward networks of the functions that compute by elements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hypothesis import strategies as st

from compiler.ops.pointwise import POINTWISE
from tests.support.places import SPECS

# Of what is above 0 or at most 1, so that no number is infinite.
TAMED = {"log": "log(1 + {x} * {x})", "sqrt": "sqrt(1 + {x} * {x})", "exp": "exp(-({x} * {x}))"}
FUNCTIONS = [TAMED.get(f.kind, f"{f.kind}({{x}})") for f in POINTWISE]
NUMBERS = st.sampled_from(["1", "0.5", "-1.5", "3", "hidden_size / 16"])
EXAMPLES = [
    SPECS / "examples" / f"{name}.dsl"
    for name in ("gated_shared_moe", "biased", "sinks", "differential", "nsa")
]

MOE = """block RandomMoE(x: [batch, seq, hidden_size]) -> [batch, seq, hidden_size]:
  params hidden_size
  return DeepSeekMoE(x, expert = RandomFF)
"""

VECTOR, WIDE, ONE = ("hidden_size",), ("wide",), ("1",)
HEADS, SCALES = ("heads", "part"), ("heads", "1")
Shape = tuple[str, ...]


@dataclass
class Writer:
    """Statements of a block. `shapes` are those of its tensors behind the dimensions of tokens."""

    draw: st.DrawFn
    wild: bool
    """Whether shapes may not meet."""
    lines: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=lambda: {"x": VECTOR})
    free: set[str] = field(default_factory=set)
    """Tensors that have no dimensions of tokens."""

    def leading_to(self, result: str) -> list[str]:
        """The statements that a result is made of: weights that nothing reads have no gradient."""
        needed, lines = set(re.findall(r"\w+", result)), []
        for line in reversed(self.lines):
            name, expression = line.split(" = ", 1)
            if name in needed:
                needed |= set(re.findall(r"\w+", expression))
                lines.append(line)
        return lines[::-1]

    def pick(self, *shapes: Shape, tokens: bool = False) -> str:
        """The name of a tensor, of one of these shapes if any are given; `x` if there is none."""
        found = [n for n, s in self.shapes.items() if not shapes or s in shapes]
        found = [n for n in found if not (tokens and n in self.free)]
        return self.draw(st.sampled_from(found or ["x"]))

    def set(self, expression: str, shape: Shape, free: bool = False) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        self.shapes[name] = shape
        self.free |= {name} if free else set()
        return name

    def move(self) -> None:
        kind = self.draw(st.sampled_from(
            ["linear", "function", "function", "number", "two", "two", "norm", "parameter", "heads"]
        ))  # fmt: skip
        getattr(self, f"_{kind}")()

    def _linear(self) -> None:
        x, to = (
            self.pick(VECTOR, WIDE, tokens=True),
            self.draw(st.sampled_from([VECTOR, WIDE, ONE])),
        )
        bias = self.draw(st.sampled_from(["", ", bias = true"]))
        self.set(f"linear({x}, to = {to[0]}, name = p{len(self.lines)}{bias})", to)

    def _function(self) -> None:
        x = self.pick()
        self.set(self.draw(st.sampled_from(FUNCTIONS)).format(x=x), self.shapes[x], x in self.free)

    def _number(self) -> None:
        x, n = self.pick(), self.draw(NUMBERS)
        written = [
            "{x} + {n}",
            "{n} - {x}",
            "{n} * {x}",
            "{x} / ({n})",
            "-{x}",
            "{n} / (1 + {x} * {x})",
        ]
        text = self.draw(st.sampled_from(written)).format(x=x, n=n)
        self.set(text, self.shapes[x], x in self.free)

    def _two(self) -> None:
        a = self.pick()
        names = [n for n in self.shapes if self.wild or self._meets(a, n)]
        b = self.draw(st.sampled_from(names))
        written = ["{a} + {b}", "{b} - {a}", "{a} * {b}", "{a} / (1 + {b} * {b})"]
        text = self.draw(st.sampled_from(written)).format(a=a, b=b)
        self.set(text, self.shapes[a], a in self.free and b in self.free)

    def _meets(self, a: str, b: str) -> bool:
        """Whether b is as a, or is broadcast to it."""
        shape, other = self.shapes[a], self.shapes[b]
        if b not in self.free and (a in self.free or len(shape) != len(other)):
            return False
        return other in (shape, ONE) or (shape, other) == (HEADS, SCALES)

    def _norm(self) -> None:
        x, name = self.pick(tokens=True), f"n{len(self.lines)}"
        written = ["rms_norm({x}, name = {n})", "layer_norm({x}, name = {n})",
                   "layer_norm({x}, bias = false, name = {n})", "softmax({x})"]  # fmt: skip
        self.set(self.draw(st.sampled_from(written)).format(x=x, n=name), self.shapes[x])

    def _parameter(self) -> None:
        shape = self.draw(st.sampled_from([VECTOR, WIDE, ONE, HEADS, SCALES]))
        init, std = self.draw(
            st.sampled_from([("0", "0"), ("1", "0"), ("0.5", "0.1"), ("-2", "0")])
        )
        dims = ", ".join(shape)
        text = f"parameter({dims}, name = w{len(self.lines)}.p, init = {init}, std = {std})"
        self.set(text, shape, free=True)

    def _heads(self) -> None:
        x = self.pick(VECTOR, HEADS)
        call = "flatten" if self.shapes[x] == HEADS else "unflatten"
        shape = VECTOR if self.shapes[x] == HEADS else HEADS
        if self.shapes[x] in (VECTOR, HEADS):
            self.set(f"{call}({x}, heads, part)", shape, x in self.free)


@st.composite
def feed_forward(draw: st.DrawFn, wild: bool = False) -> str:
    """A block `RandomFF`; without `wild` one that can be lowered."""
    w = Writer(draw, wild)
    for _ in range(draw(st.integers(1, 9))):
        w.move()
    last = [name for name in w.shapes if name not in w.free][-1]
    if w.shapes[last] == HEADS:
        last = f"flatten({last}, heads, part)"
    body = "\n".join(f"  {line}" for line in w.leading_to(last))
    return f"""block RandomFF(x: [.., hidden_size]) -> [.., hidden_size]:
  params hidden_size
  let wide = {draw(st.integers(1, 9))}
  let heads = {draw(st.sampled_from([1, 2, 4]))}
  let part = hidden_size // heads
{body}
  return linear({last}, to = hidden_size, name = out)
"""


@st.composite
def attention(draw: st.DrawFn) -> str:
    """A block `RandomAttention`: heads with or without biases, norms, gates and scales, which see
    all before them, a window, or what a mask lets them see."""

    def bias() -> str:
        return draw(st.sampled_from(["", ", bias = true"]))

    norm = draw(st.sampled_from(["{x}", "rms_norm({x}, name = {x}_norm)",
                                 "layer_norm({x}, name = {x}_norm)"]))  # fmt: skip
    each_head = "unflatten(linear(x, to = heads, name = gate), heads, 1)"
    each = "unflatten(linear(x, to = heads * head_dim, name = gate), heads, head_dim)"
    scale = "parameter(heads, 1, name = head.scale, init = 1)"
    gate = draw(st.sampled_from([
        "o", f"o * sigmoid({each_head})", f"o * (1 + tanh({each}))", f"o - {scale} * v",
        f"o / (1 + {scale} * {scale})",
    ]))  # fmt: skip
    function = draw(st.sampled_from(["{x}", "gelu({x})", "{x} + 0.5"])).format(x="v")
    given = st.sampled_from([
        "window = 3", "softcap = 0.7", "mask = q - k < 2 or k % 3 == 1",
        "sinks = parameter(heads, name = sink.p, init = 0.5)", "selected = selected",
    ])  # fmt: skip
    chosen = draw(st.lists(given, unique=True))
    if "selected = selected" in chosen:  # which goes with neither
        chosen = [one for one in chosen if not one.startswith(("window", "mask"))]
    scores = "".join(f", {one}" for one in chosen)
    turn = draw(st.sampled_from(["rotate", "rotate_halves"]))
    lines = [
        f"{n} = unflatten(linear(x, to = heads * head_dim, name = {n}_proj{bias()}), "
        "heads, head_dim)"
        for n in "qkv"
    ]
    lines += [f"{n} = {norm.format(x=n)}" for n in "qk"]
    lines += [
        f"v = {function}",
        "cos, sin = rope_table(position, dim = head_dim, theta = 10000)",
        f"q = {turn}(q, cos, sin)",
        f"k = {turn}(k, cos, sin)",
    ]
    if "selected = selected" in chosen:
        lines += [
            "index_k = linear(x, to = head_dim, name = index_k_proj)",
            "index_weight = float32(linear(x, to = heads, name = index_weight_proj))",
            "new_k, new_v, index_k = cache(k, v, index_k)",
            "selected = lightning_indexer(q, index_k, index_weight, topk = topk)",
            "collect indexer = indexer_loss(q, new_k, detach(q), index_k, index_weight, selected, "
            "scale = head_dim ** -0.5)",
        ]
    else:
        lines += ["new_k, new_v = cache(k, v)"]
    lines += [
        f"o = attention(q, new_k, new_v, position, scale = head_dim ** -0.5{scores})",
        f"o = {gate}",
    ]
    lines += ["o = flatten(o, heads, head_dim)"]
    lines += [f"return linear(o, to = hidden_size, name = o_proj{bias()})"]
    body = "\n".join(f"  {line}" for line in lines)
    states = "[batch, seq, hidden_size]"
    return f"""block RandomAttention(x: {states}, position: i64[batch, seq]) -> {states}:
  params hidden_size, num_attention_heads, head_dim
  let heads = num_attention_heads
  let topk = {draw(st.sampled_from([1, 3, 20]))}
{body}
"""
