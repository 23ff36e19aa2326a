"""What the text of a graph may say, and what is said to those who write it wrongly."""

from __future__ import annotations

import math

import pytest
from lark import Token

from compiler.graph.core import Attr, Boundary, Derivative, Graph, Op, Program, Step, Value, Weight
from compiler.graph.parse import MAX_NESTING, grammar, parse_program
from compiler.graph.text import print_graph, print_program
from compiler.graph.types import Dim, Type, parse_type
from compiler.ops import OPS
from dsl.diagnostic import Diagnostic, DiagnosticError, render
from dsl.source import Source

HEAD = "program @p root @G\n"
SMALL = HEAD + "graph @G(%x: f32[]) -> (y: f32[]) {\n  %y = silu(%x) : f32[]\n  return(%y)\n}\n"


def parsed(text: str) -> Program:
    return parse_program(Source("a.graph", text))


def problems(text: str) -> list[str]:
    with pytest.raises(DiagnosticError) as caught:
        parsed(text)
    return [
        f"{d.code} {d.span.line}:{d.span.column} {d.message}" if d.span else d.message
        for d in caught.value.diagnostics
    ]


@pytest.mark.slow
def test_the_grammar_has_no_ambiguities() -> None:
    grammar(strict=True)


def test_operators_are_no_keywords() -> None:
    assert {t.type for t in grammar().lex(" ".join(OPS))} == {"WORD"}


def test_a_small_program_reads_back() -> None:
    program = parsed(SMALL)
    (op, end) = program.main.ops
    assert (op.kind, op.operands, op.result.type) == ("silu", program.main.args, Type("f32"))
    assert end.operands == [op.result]
    assert print_program(program) == SMALL.replace("root @G\n", "root @G\n\n")


DERIVED = """program @p root @G {
  alias @a = @b
  derivative @G = @H
  derivative @F = @I, @W <results=(0, 2), lifted=(1), arguments=(0)>
  boundary <received=(h_in), sent=(h, "true")>
  count @n = @labels
  step @G = @S, @U
}
"""


def test_what_a_program_says_of_its_graphs_reads_back() -> None:
    program = parsed(DERIVED)
    assert program.counts == {"n": "labels"}
    assert program.aliases == {"a": "b"} and program.steps == {"G": Step("S", "U")}
    assert program.derivatives == {
        "G": Derivative("H"),
        "F": Derivative("I", "W", results=(0, 2), lifted=(1,), arguments=(0,)),
    }
    assert program.boundary == Boundary(("h_in",), ("h", "true"))
    assert print_program(program) == DERIVED
    assert program.forward_of("W") == "F" and program.forward_of("S") == "S"


@pytest.mark.parametrize(
    "line",
    [
        "derivative @G = @H <results=0>",
        "derivative @G = @H <results=(0, true)>",
        "derivative @G = @H <others=(0)>",
        "boundary <sent=(0)>",
        "boundary <results=(h)>",
    ],
)
def test_a_link_says_nothing_else(line: str) -> None:
    (problem,) = problems(f"program @p root @G {{ {line} }}\n")
    assert "E507" in problem and "there is no such" in problem


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-3, "-3"),
        (2**63 - 1, "9223372036854775807"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (1e-06, "1e-06"),
        (1e16, "1e+16"),
        (0.1352337788608801, "0.1352337788608801"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (True, "true"),
        (False, "false"),
        ("top2_sum", "top2_sum"),
        ("model.layers.*", "model.layers.*"),
        ("a*b+c", "a*b+c"),
        ("true", '"true"'),
        ("nan", '"nan"'),
        ("", '""'),
        ("two words", '"two words"'),
        ("1a", '"1a"'),
        ('say "a\\b"', r'"say \"a\\b\""'),
        ("\x1b[31m\n\u202e", r'"\u{1b}[31m\u{a}\u{202e}"'),
        ("\U0010ffff\ud800", r'"\u{10ffff}\u{d800}"'),
        ("größe", '"größe"'),
        ((), "()"),
        (("k",), "(k)"),
        (("heads", 4, "head_dim", 8), "(heads=4, head_dim=8)"),
        (("a", "b", 1, 2, "c", 1.0, "d", True), "(a, b=1, 2, c, 1.0, d, true)"),
        (("two words", 3), '("two words", 3)'),
        (((1, ("x", 2)), ()), "((1, (x=2)), ())"),
    ],
)
def test_attributes_print_and_read_back(value: Attr, text: str) -> None:
    graph = Graph("G", ops=[Op("op", attrs={"a": value}), Op("return")])
    assert f"  op() <a={text}>\n" in print_graph(graph)
    again = parsed(print_program(Program("p", "G", {"G": graph}))).main.ops[0].attrs["a"]
    assert repr(again) == repr(value)


@pytest.mark.parametrize(
    ("type", "text"),
    [
        (Type("f32", (), ("expert",)), "f32[] partial(expert)"),
        (
            Type("bf16", (Dim("batch", axes=("replica", "expert")), Dim("seq", offset=2))),
            "bf16[batch@(replica, expert), seq-2]",
        ),
        (
            Type("f32", (Dim("shard", 8, axes=("expert",)), Dim("h", 2)), ("replica", "expert")),
            "f32[shard=8@expert, h=2] partial(replica, expert)",
        ),
    ],
)
def test_placements_print_and_read_back(type: Type, text: str) -> None:
    assert str(type) == text
    assert parse_type(text) == type


@pytest.mark.parametrize("text", ["f32[a=2@]", "f32[a=2@(b)]", "f32[a=2@(b, c]", "f32[@a]"])
def test_what_is_no_placement_is_no_dimension(text: str) -> None:
    with pytest.raises(ValueError, match="is no dimension"):
        parse_type(text)


@pytest.mark.parametrize(
    "about",
    [
        "one",
        " ",
        "end \n ",
        "two\n\nparts",
        " indented\n\n",
        "\n",
        "a\\b \\u{41}",
        "// graph",
        "\x1b[0m\r",
        "é",
    ],
)
def test_about_reads_back(about: str) -> None:
    graph = Graph("G", ops=[Op("return")], about=about)
    text = print_program(Program("p", "G", {"G": graph}))
    assert parsed(text).main.about == about
    assert all(c == "\n" or c.isprintable() for c in text)


def test_only_comments_right_above_a_graph_are_kept() -> None:
    text = SMALL.replace("graph @G", "// a note\n\n// about\n// it\ngraph @G")
    text = text.replace("  return", "  // the end\n  return")
    assert parsed(text).main.about == "about\nit"


def test_weights_say_what_is_not_as_usual() -> None:
    weights = {
        "a": Weight(Type("f32", (Dim("n", 2),))),
        "b.*.w": Weight(Type("bf16"), "ones", 0.5, False, 3),
    }
    graph = Graph("G", ops=[Op("return")], weights=weights)
    text = print_program(Program("p", "G", {"G": graph}))
    assert "  weight @a : f32[n=2]\n" in text
    assert "  weight @b.*.w : bf16[] <init=ones, std=0.5, trainable=false, stack=3>\n" in text
    assert parsed(text).main.weights == weights


def test_types_read_back() -> None:
    dims = (Dim("batch"), Dim("seq", None, 12), Dim("a*b+2", 6))
    type = Type("bf16", dims)
    assert str(type) == "bf16[batch, seq-12, a*b+2=6]"
    graph = Graph("G", [Value("x", type)], [Op("return")])
    assert parsed(print_program(Program("p", "G", {"G": graph}))).main.args[0].type == type


def test_places_are_printed_on_request_and_read_back() -> None:
    sources = [Source("v3.yaml", "one\ntwo"), Source('odd "name"', "x")]
    spans = (sources[0].span(5, 6), sources[1].span(0, 1))
    graph = Graph("G", ops=[Op("return", spans=spans)], span=spans[0])
    program = Program("p", "G", {"G": graph})
    assert "loc" not in print_program(program)
    text = print_program(program, locs=True)
    assert '  return() loc "v3.yaml":2:2 "odd \\"name\\"":1:1\n' in text
    again = parsed(text).main
    assert [s.location for s in again.ops[0].spans] == ["v3.yaml:2:2", 'odd "name":1:1']
    assert again.span is not None and again.span.location == "v3.yaml:2:2"
    # The lines of that file are not at hand; a diagnostic shows the place alone.
    assert " --> v3.yaml:2:2\n" in render([Diagnostic("E510", "broken", again.span)])


def test_without_a_place_operators_point_into_the_text() -> None:
    op = parsed(SMALL).main.ops[0]
    assert [s.location for s in op.spans] == ["a.graph:3:3"]
    assert op.spans[0].text == "%y = silu(%x) : f32[]"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("program @p", "model @p", "E501 1:1 `model` cannot stand here"),
        ("silu(%x)", "silu(%x", "E501 3:16 `:` cannot stand here"),
        ("silu(%x)", "silu(x)", "E501 3:13 `x` cannot stand here"),
        ("silu(%x)", "silu(%x) <a=1e>", "E501 3:20 `1` cannot stand here"),
        ("silu(%x)", 'silu(%x) <a="\\n">', 'E501 3:20 `"` cannot stand here'),
        ("  return(%y)\n}\n", "", "E501 4:1 the text of the graph ends too early"),
        ("silu(%x)", "silu(%z)", "E502 3:13 %z is not defined here"),
        ("return(%y)", "a() { |%z: f32[]| b() }\na(%z)", "E502 5:3 %z is not defined here"),
        ("%y =", "%y, %z =", "E503 3:12 2 results of silu and 1 types"),
        (": f32[]\n  r", ": f33[]\n  r", "E505 3:19 there is no element type f33"),
        ("f32[]\n  r", "f32[1 2]\n  r", "E505 3:19 `1 2` is no dimension"),
        ("f32[]\n  r", "f32[a=]\n  r", "E505 3:19 `a=` is no dimension"),
        ("(y: f32[])", "(y: i64[])", "E506 2:7 @G says it gives (i64[]), and returns (f32[])"),
        ("(y: f32[])", "()", "E506 2:7 @G says it gives (), and returns (f32[])"),
        ("  %y =", "weight @w : f32[] <stak=2>\n%y =", "E507 3:20 a weight has no such stak"),
        ("  %y =", "weight @w : f32[] <stack=2.0>\n%y =", "E507 3:20 a weight has no such stack"),
        ("  %y =", "weight @w : f32[]\nweight @w : f32[]\n%y =", "E508 4:8 @w is given twice"),
        ("silu(%x)", "silu(%x) <a=1, a=2>", "E508 3:23 a is given twice"),
        ("@G\n", "@G {alias @a = @b alias @a = @c}\n", "E508 1:41 @a is given twice"),
    ],
)
def test_mistakes_have_a_place_and_a_reason(old: str, new: str, problem: str) -> None:
    assert SMALL.count(old) == 1
    assert problems(SMALL.replace(old, new)) == [problem]


def test_a_graph_given_twice_is_refused() -> None:
    graph = SMALL.removeprefix(HEAD)
    assert problems(HEAD + graph + graph) == ["E508 6:7 @G is given twice"]


def test_all_mistakes_are_told_at_once() -> None:
    text = SMALL.replace("silu(%x)", "silu(%z)").replace("return(%y)", "return(%yy)")
    assert [p.split()[0] for p in problems(text)] == ["E502", "E502"]


def test_help_names_what_is_near_and_what_is_possible() -> None:
    with pytest.raises(DiagnosticError) as caught:
        parsed(SMALL.replace("return(%y)", "return(%yy)"))
    assert [d.help for d in caught.value.diagnostics][-1] == "did you mean %y?"
    with pytest.raises(DiagnosticError) as caught:
        parsed(SMALL.replace("program", "prog"))
    assert [d.help for d in caught.value.diagnostics] == ["expected `program`"]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [MAX_NESTING, MAX_NESTING + 1, 5000])
def test_depth_is_limited(depth: int) -> None:
    regions = "a() { " * depth + "}" * depth
    tuples = f"a() <b={'(' * depth}{')' * depth}>"
    for nested in (regions, tuples):
        text = HEAD + f"graph @G() -> () {{ {nested} return() }}"
        if depth > MAX_NESTING:
            assert "E504" in problems(text)[0]
        else:
            assert parsed(text).main.ops[-1].kind == "return"


def test_broken_graphs_print_too() -> None:
    graph = Graph("G", result_names=("y",), about="nothing in it")
    assert print_graph(graph) == "// nothing in it\ngraph @G() -> () {\n}\n"


def test_tokens_do_not_leak_into_the_program() -> None:
    """Names of Lark's own string class would keep whole texts alive."""
    text = SMALL.replace("silu(%x)", 'silu(%x) <a=word, b=(c=1), d="e">')
    op = parsed(text).main.ops[0]
    names = [op.kind, op.result.name, *op.attrs, op.attrs["a"], op.attrs["d"]]
    assert not any(isinstance(name, Token) for name in names)
