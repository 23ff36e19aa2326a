"""docs/language.md says what the code does: its examples run, its tables are complete and right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from lark.lexer import PatternStr
from pydantic.fields import FieldInfo

from compiler.analysis import summary
from compiler.graph.types import BYTES, RUNTIME_DIMS
from compiler.lower import lower
from compiler.lower.forms import FORMS, Kind
from compiler.lower.state import MAX_OPERATORS
from compiler.lower.statements import MAX_COPIES
from compiler.pipeline import Compiled, compile
from dsl.evaluate import FUNCTIONS, MAX_MAGNITUDE, evaluate
from dsl.grammar import TABLES, compute_tables, grammar
from dsl.load import load
from dsl.parse import MAX_EXPRESSION, MAX_NESTING, parse_blocks, parse_expression
from dsl.schema import (
    SIZES,
    VARIANT_KEYS,
    BlockUse,
    Phase,
    Schedule,
    Spec,
    json_schema,
    text_of,
)
from dsl.source import Source
from dsl.syntax import KEYWORDS
from dsl.units import UNITS, parse_quantity
from tests.support.command import Run, typed
from tests.support.documents import Example, Row, examples, follow, sections, tables
from tests.support.places import ROOT, TINY

TEXT = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
EXAMPLES = examples(TEXT)


def plain(cell: str) -> str:
    """A cell without the marks of code."""
    return cell.strip("`")


def column(first: str, index: int = 0) -> list[str]:
    return [plain(row[index]) for row in tables(TEXT, first)]


# ---- examples -------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_and_commands_in_the_order_of_the_text(dslc: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert follow(TEXT, tmp_path, partial(typed, dslc)) >= 5


@pytest.mark.slow
def test_every_spec_of_the_text_compiles_with_each_of_its_variants(tmp_path: Path) -> None:
    specs = [e.name for e in EXAMPLES if e.language == "yaml" and e.name]
    for example in EXAMPLES:
        if example.name:
            (tmp_path / example.name).write_text(example.text, encoding="utf-8")
    assert len(specs) >= 3
    for name in specs:
        variants = re.findall(r"^  (\w+): \{\w+\.", (tmp_path / name).read_text(), re.M)
        for chosen in ((), *((variant,) for variant in variants)):
            assert compile(load(tmp_path / name, variants=chosen)).programs["decode"].main


@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if e.language == "yaml" and not e.name],
    ids=lambda e: e.text[:12],
)
def test_a_part_of_a_spec_loads_in_place_of_the_same_part_of_a_whole_one(
    example: Example, tmp_path: Path
) -> None:
    whole = parts(TINY.read_text(encoding="utf-8"))
    part = parts(example.text)
    assert part and part.keys() <= whole.keys()
    spec = tmp_path / "spec.yaml"
    spec.write_text("".join({**whole, **part}.values()), encoding="utf-8")
    description = load(spec)
    assert all(description.sets(key) for key in part)


def parts(text: str) -> dict[str, str]:
    """The text of each section of a spec."""
    found = re.split(r"^(?=\w)", text, flags=re.M)
    return {part.split(":")[0]: part for part in found if ":" in part}


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e.language == "dsl"], ids=lambda e: e.text[:16]
)
def test_every_block_of_the_text_works_in_a_model(example: Example, tmp_path: Path) -> None:
    parsed = parse_blocks(Source("example.dsl", example.text))
    (block,) = (one for one in parsed if not one.settings)
    name, group = block.name.value, "architecture.layers.0"
    # What a block is for follows from the tensors that it takes.
    use = {
        "x": [f"{group}.feed_forward={name}"],
        "x, position": [f"{group}.{'block' if block.slots else 'attention'}={name}"],
        "tokens, labels, position, balance_alpha": [
            f"architecture.block={name}",
            "architecture.mtp.depth=0",
        ],
    }[", ".join(a.name.value for a in block.arguments)]
    compiled = compile_with(example, tmp_path, use)
    assert name in compiled.lowered.graphs


def compile_with(example: Example, folder: Path, sets: list[str]) -> Compiled:
    """The tiny model with a block of the text."""
    (folder / "example.dsl").write_text(example.text, encoding="utf-8")
    for one in EXAMPLES:
        if one.language == "python" and one.name:
            (folder / one.name).write_text(one.text, encoding="utf-8")
    library = ["causal_lm", "decoder", "mla", "swiglu", "deepseek_moe", "mtp"]
    blocks = ", ".join([*library, str(folder / "example.dsl")])
    return compile(load(TINY, sets=[f"blocks=[{blocks}]", *sets]))


def test_in_place_and_named_calls_name_their_weights_as_the_text_says(tmp_path: Path) -> None:
    example = next(e for e in EXAMPLES if "block Twice" in e.text)
    use = ["architecture.layers.0.feed_forward=Twice"]
    graph = compile_with(example, tmp_path, use).lowered.graphs["Twice"]
    assert "gate_proj.weight" in graph.weights
    assert [op.attrs["scope"] for op in graph.walk() if op.kind == "call"] == ["first"]


@pytest.mark.slow
def test_names_of_tensors_are_put_together_as_the_text_says() -> None:
    compiled = compile(load(TINY))
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    published = [re.sub(r"\{(\d+)\.\.\d+\}", r"\1", p.name) for p in numbers.published()]
    library = [p.read_text(encoding="utf-8") for p in (ROOT / "specs" / "blocks").glob("*.dsl")]
    for where, written, becomes in tables(TEXT, "where"):
        (text,) = (t for t in library if f"block {plain(where)}(" in t)
        # `f(.., a, name = b)` is in the block's text, whatever stands for the points.
        pattern = re.escape(written.split("`")[1]).replace(r"\.\.", ".*?").replace(r"\ ", r"\s*")
        assert re.search(pattern, text), f"{where} does not hold {written}"
        name = plain(becomes)
        assert any(p.startswith(name) if name[-1] == "." else p == name for p in published), name


# ---- tables ---------------------------------------------------------------------------------


def test_the_keys_of_a_spec_are_those_of_the_schema() -> None:
    expected = [*schema_rows((), Spec), *schema_rows(("SCHEDULE", "N"), Phase), *variant_rows()]
    found = [row for row in tables(TEXT, "key") if not row[0].endswith(".SLOT`")]
    assert found == expected, "\n".join("| " + " | ".join(row) + " |" for row in expected)
    slots = [plain(row[0]) for row in tables(TEXT, "key") if row[0].endswith(".SLOT`")]
    free = [name for name, d in json_schema()["$defs"].items() if d.get("additionalProperties")]
    assert len(slots) == len(free) == 2


def schema_rows(path: tuple[str, ...], section: Any) -> Iterator[Row]:
    """One row for each key, in the order of the schema."""
    schema = json_schema()
    properties = schema if section is Spec else schema["$defs"][section.__name__]
    for name, field in section.model_fields.items():
        here = (*path, name)
        items = get_args(field.annotation)
        inner = items[0] if items and hasattr(items[0], "model_fields") else field.annotation
        described = properties["properties"][name]
        yield row(here, field, described, inner)
        if hasattr(inner, "model_fields") and inner is not Schedule:
            listed = described.get("type") == "array"
            yield from schema_rows((*here, "N") if listed else here, inner)


def row(path: tuple[str, ...], field: FieldInfo, schema: dict[str, Any], inner: Any) -> Row:
    shared = path[-1] in SIZES  # what a section leaves out is as in the other
    default = "required" if field.is_required() and not shared else default_of(field)
    cells = (
        f"`{'.'.join(path)}`",
        value_of(schema, field, inner),
        default,
        field.description or "",
    )
    return tuple(cells)


def default_of(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Schedule):
        value = value.value_at(0)
    if isinstance(value, BlockUse):
        return f"`{value}`"
    simple = isinstance(value, bool | int | float) or (isinstance(value, str) and value)
    return f"`{text_of(value).strip(chr(34))}`" if simple else ""


def value_of(schema: dict[str, Any], field: FieldInfo, inner: Any) -> str:
    if inner is Schedule:
        return "schedule"
    if inner is BlockUse:
        return "block"
    if hasattr(inner, "model_fields"):
        return "list of sections" if schema.get("type") == "array" else "section"
    one = [each["const"] for each in schema.get("anyOf", ()) if "const" in each]
    if words := schema.get("enum", one):
        return " or ".join(f"`{word}`" for word in words)
    if schema.get("type") == "array":
        return "list of text"
    if schema.get("type") == "object":
        return "mapping of values by name"
    if "anyOf" not in schema:
        return "text"
    number = schema["anyOf"][0]
    if number["type"] in ("boolean", "string"):
        return "true or false" if number["type"] == "boolean" else "text"
    word = "whole number" if number["type"] == "integer" else "number"
    if "maximum" in number:
        return f"{word}, {number['minimum']} to {number['maximum']}"
    several = any(one.get("type") == "array" for one in schema["anyOf"])
    return f"{word}, at least {number['minimum']}{', or a list of them' if several else ''}"


def variant_rows() -> list[Row]:
    kinds = {"extends": "text", "set": "changes by path", "variants": "changes by path, by name"}
    assert kinds.keys() == VARIANT_KEYS.keys()
    return [(f"`{key}`", kinds[key], "", about) for key, about in VARIANT_KEYS.items()]


def test_quantities_have_the_values_in_the_table_and_every_unit_is_there() -> None:
    rows = tables(TEXT, "written")
    for written, value, *_ in rows:
        number = parse_quantity(plain(written))
        assert repr(number) == repr(type(number)(value)), written
    named = set(re.findall(r"[A-Za-z]+", " ".join(w for w, *_ in rows)))
    assert named - {"e"} == set(UNITS)


def test_expressions_have_the_values_in_the_table() -> None:
    names = {"hidden_size": 7168, "n_group": 8}
    rows = tables(TEXT, "expression")
    for written, value in rows:
        source = Source("table", plain(written))
        result = evaluate(parse_expression(source, 0, len(source.text)), names)
        assert text_of(result) == value, written


def test_operators_are_those_of_the_grammar() -> None:
    cells = " ".join(row[0] for row in tables(TEXT, "operators"))
    named = {word for code in re.findall(r"`([^`]+)`", cells) for word in code.split()}
    signs = {t.name: t.pattern.value.replace("\\", "").split("|") for t in grammar().terminals}
    wanted = {"POWER", "PLUS", "STAR", "SLASH", "PERCENT", "COMPARE"}
    expected = {sign for name in wanted for sign in signs[name]} | {"-", "or", "and", "not"}
    # `-a` and `a if condition else b` show where their operands stand.
    assert named - {"a", "b", "condition", "if", "else", "-a"} == expected


def test_functions_of_numbers_are_those_of_the_evaluator() -> None:
    rows = [row for row in tables(TEXT, "function") if len(row) == 2]
    cells = [row[0] for row in rows if row[0].split("(")[0][1:] in FUNCTIONS]
    assert [c[1:].split("(")[0] for c in cells] == list(FUNCTIONS)
    for cell in cells:
        _, fewest, most = FUNCTIONS[cell[1:].split("(")[0]]
        assert fewest == 1 and (cell.count(",") == 0) == (most == 1)


def test_functions_of_blocks_are_those_of_the_compiler() -> None:
    rows = [row for row in tables(TEXT, "function") if len(row) == 3]
    expected = {f"`{name}({form.signature})`": form.about for name, form in FORMS.items()}
    assert {row[0]: row[2] for row in rows} == expected
    assert len(rows) == len(FORMS)
    assert {row[0]: row[1] for row in tables(TEXT, "argument") if row[0][1:-1] in kinds()} == {
        f"`{name}`": about for name, about in kinds().items()
    }


def kinds() -> dict[str, str]:
    return {kind.name.lower(): kind.value for kind in Kind}


def test_element_types_and_run_time_dimensions_are_all_there() -> None:
    assert set(column("element type")) == set(BYTES)
    found = {plain(name): about for name, about in tables(TEXT, "dimension")}
    assert found == RUNTIME_DIMS


def test_the_outermost_block_takes_and_gives_what_the_text_says() -> None:
    description = load(TINY)
    block = description.blocks["CausalLM"]
    declared = {a.name.value: a.type for a in block.arguments}
    rows = [row for row in tables(TEXT, "argument") if plain(row[0]) in declared]
    assert len(rows) == len(declared)
    for name, type, _ in rows:
        node = declared[plain(name)]
        assert plain(type) == f"{node.dtype}[{', '.join(d.value for d in node.dims)}]"
    assert set(column("output")) == set(lower(description).main.result_names)


# ---- grammar --------------------------------------------------------------------------------


def test_the_tables_are_those_of_the_grammar_which_is_not_ambiguous() -> None:
    assert compute_tables() == TABLES.read_text(encoding="utf-8"), "`make golden` writes them"


def test_limits_are_those_of_the_code() -> None:
    flowing = " ".join(TEXT.split())
    assert f"{MAX_COPIES:,} at most" in flowing
    assert f"at most {MAX_OPERATORS:,} operators" in flowing
    assert f"{MAX_EXPRESSION:,} characters" in flowing
    assert f"{MAX_NESTING} brackets deep" in flowing
    assert f"10**{len(str(MAX_MAGNITUDE)) - 1}" in flowing


def test_keywords_are_those_of_the_grammar() -> None:
    assert column("keyword") == list(KEYWORDS)
    words = {
        t.pattern.value
        for t in grammar().terminals
        if isinstance(t.pattern, PatternStr) and t.pattern.value.isalpha()
    }
    assert words | {"and", "or", "not", "true", "false"} == set(KEYWORDS)


def test_rules_are_those_of_the_grammar() -> None:
    # Lark makes rules of its own for repetitions; their names begin with two underscores.
    rules = {str(rule.origin.name) for rule in grammar().rules}
    assert set(column("rule")) == {name for name in rules if not name.startswith("__")}
    assert len(column("rule")) == len(set(column("rule")))


def test_terminals_are_those_of_the_grammar() -> None:
    text = (ROOT / "dsl" / "block.lark").read_text(encoding="utf-8")
    named = set(re.findall(r"^(_?[A-Z]+)(?:\.\d)?:", text, re.M))
    declared = set(re.findall(r"^%declare (.*)$", text, re.M)[0].split())
    assert set(column("terminal")) == named | declared


def test_every_word_that_begins_a_statement_has_its_paragraph() -> None:
    paragraphs = re.findall(r"^(?:<a [^>]*></a>)?\*\*(.+?)\*\*", TEXT, re.M)
    explained = " ".join(paragraphs)
    for rule in grammar().rules:
        if str(rule.origin.name) == "statement":
            (symbol,) = rule.expansion
            word = symbol.name.removesuffix("_statement")
            assert word in explained.lower().replace("assignment", "assign"), word


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        file = ROOT / "docs" / path if path else ROOT / "docs" / "language.md"
        assert file.exists(), target
        assert not anchor or anchor in sections(file.read_text(encoding="utf-8")), target
