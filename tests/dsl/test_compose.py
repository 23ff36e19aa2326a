"""`extends`, `set`, variants and `--set`. Rendered messages are in test_diagnostic."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest

from dsl.compose import Composed, compose
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.yaml import Mapping, Node, Sequence

BASE = """\
model: base
params: {hidden_size: 64, n_group: 2}
architecture:
  layers:
    - {repeat: 1}
    - {repeat: 2}
variants:
  small: {params.hidden_size: 16}
  deep: {architecture.layers.1.repeat: 20, model: deep}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("base.yaml", BASE)
    return tmp_path


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def read(name: str, *sets: str, variants: Collection[str] = ()) -> Composed:
    return compose(Path(name), name, sets, [*variants])


def refused(name: str, *sets: str, variants: Collection[str] = ()) -> list[Diagnostic]:
    with pytest.raises(DiagnosticError) as raised:
        read(name, *sets, variants=variants)
    return raised.value.diagnostics


def plain(node: Node) -> object:
    if isinstance(node, Mapping):
        return {key: plain(entry.node) for key, entry in node.entries.items()}
    return [plain(item) for item in node.items] if isinstance(node, Sequence) else node.value


def value(composed: Composed, *path: str | int) -> tuple[object, str, str]:
    """A value, its place and its label."""
    node: Node = composed.root
    for part in path:
        if isinstance(node, Sequence):
            node = node.items[int(part)]
        else:
            assert isinstance(node, Mapping)
            node = node.entries[str(part)].node
    return plain(node), node.span.location, composed.label(path)


def test_a_file_by_itself() -> None:
    composed = read("base.yaml")
    assert plain(composed.root) == {
        "model": "base",
        "params": {"hidden_size": "64", "n_group": "2"},
        "architecture": {"layers": [{"repeat": "1"}, {"repeat": "2"}]},
    }
    assert value(composed, "params", "n_group") == ("2", "base.yaml:2:36", "")
    assert [source.name for source in composed.sources] == ["base.yaml"]


def test_each_overlay_hides_those_before_it() -> None:
    write(
        "sub/middle.yaml",
        "extends: ../base.yaml\nset:\n  params.hidden_size: 128\n  params.new: 1\n",
    )
    write(
        "top.yaml",
        "extends: sub/middle.yaml\nmodel: top\nset: {params.n_group: 4}\n"
        "variants: {small: {params.hidden_size: 32, 'architecture.layers': [{repeat: 7}]}}\n",
    )
    chain = read("top.yaml")
    assert [source.name for source in chain.sources] == ["base.yaml", "sub/middle.yaml", "top.yaml"]
    assert value(chain, "model") == ("top", "top.yaml:2:8", "")
    assert value(chain, "params", "hidden_size") == ("128", "sub/middle.yaml:3:23", "")
    assert value(chain, "params", "new") == ("1", "sub/middle.yaml:4:15", "")
    assert value(chain, "params", "n_group") == ("4", "top.yaml:3:23", "")

    # The variant of the same name replaces that of the base, and lists are replaced whole.
    small = read("top.yaml", variants=["small"])
    assert value(small, "params", "hidden_size") == ("32", "top.yaml:4:40", "variant small")
    assert value(small, "architecture", "layers") == (
        [{"repeat": "7"}], "top.yaml:4:67", "variant small",
    )  # fmt: skip
    assert value(small, "architecture", "layers", 0, "repeat")[2] == "variant small"
    assert value(read("top.yaml", variants=["deep"]), "model") == (
        "deep",
        "base.yaml:9:51",
        "variant deep",
    )

    sets = read("top.yaml", "params.hidden_size=8", "params.hidden_size = 9", variants=["small"])
    assert value(sets, "params", "hidden_size") == ("9", "--set:1:22", "--set")
    assert value(sets, "architecture", "layers", 0, "repeat") == (
        "7",
        "top.yaml:4:77",
        "variant small",
    )


def test_variants_combine() -> None:
    write(
        "top.yaml", "extends: base.yaml\nvariants: {wide: {params.hidden_size: 16, params.new: 1}}"
    )
    both = read("top.yaml", "params.new=2", variants=["small", "small", "deep", "wide"])
    assert value(both, "params", "hidden_size") == ("16", "top.yaml:2:39", "variant wide")
    assert value(both, "architecture", "layers", 1, "repeat")[::2] == ("20", "variant deep")
    assert value(both, "model")[0] == "deep"
    assert value(both, "params", "new")[::2] == ("2", "--set")


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ("params.n: 1", "params.n: 2", "params.n"),
        ("params.n: 1", 'params.n: "1"', "params.n"),
        ("params.n: null", "params.n: 2", "params.n"),
        ("params: {n: 1}", "params.n: 1", "params"),
        (
            "architecture.layers.0.repeat: 1",
            "architecture.layers: [{repeat: 1}]",
            "architecture.layers",
        ),
    ],
)
def test_variants_that_contradict_each_other(one: str, other: str, path: str) -> None:
    write(
        "two.yaml",
        f"extends: base.yaml\nset: {{params.n: 3}}\nvariants:\n  a: {{{one}}}\n  b: {{{other}}}\n",
    )
    for first, second in (("a", "b"), ("b", "a")):
        [problem] = refused("two.yaml", variants=[first, second])
        assert problem.code == "E120"
        assert problem.message == f"the variants `{first}` and `{second}` set `{path}` differently"
        assert problem.span and problem.span.line == (5 if second == "b" else 4)
        read("two.yaml", variants=[first])


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("params.x=3", ("params", "x"), "3"),
        ('params.x="a b"', ("params", "x"), "a b"),
        ("params.x=a = b", ("params", "x"), "a = b"),
        ("params.x={a: [1, 2]}", ("params", "x"), {"a": ["1", "2"]}),
        ("params.x=", ("params", "x"), ""),
        ("architecture.layers.1.repeat=3 + 4", ("architecture", "layers", 1, "repeat"), "3 + 4"),
        ("architecture.layers.1={repeat: 9}", ("architecture", "layers", 1), {"repeat": "9"}),
        ("train.loss.mtp_weight=1", ("train",), {"loss": {"mtp_weight": "1"}}),
    ],
)  # fmt: skip
def test_values_of_the_command_line(
    text: str, path: tuple[str | int, ...], expected: object
) -> None:
    assert value(read("base.yaml", text), *path)[0] == expected


def test_an_added_key_stands_where_its_path_names_it() -> None:
    root = read("base.yaml", "train.loss.alpha=1").root
    train = root.entries["train"]
    assert train.key_span.location == "--set:1:1"
    assert isinstance(train.node, Mapping)
    loss = train.node.entries["loss"].node
    assert isinstance(loss, Mapping)
    assert loss.entries["alpha"].key_span.location == "--set:1:12"


@pytest.mark.parametrize(
    ("sets", "code", "place"),
    [
        (["params.hidden_size"], "E115", "--set:1:1"),
        ([" = 3"], "E115", "--set:1:1"),
        (["params..x=3"], "E114", "--set:1:8"),
        (["variants.small=3"], "E114", "--set:1:1"),
        (["architecture.layers.2.repeat=3"], "E114", "--set:1:21"),
        (["architecture.layers.-1.repeat=3"], "E114", "--set:1:21"),
        (["architecture.layers.٣=3"], "E114", "--set:1:21"),
        ([f"architecture.layers.{'9' * 5000}=3"], "E114", "--set:1:21"),
        (["params.hidden_size.x=3"], "E114", "--set:1:20"),
        ([".".join("x" * 60) + "=3"], "E114", "--set:1:1"),
        (["params.x=[1"], "E103", "--set:1:12"),
        (["params.x=&a 1"], "E105", "--set:1:10"),
        (["params.x=\udc80"], "E109", "--set:1:10"),
    ],
)  # fmt: skip
def test_refused_on_the_command_line(sets: list[str], code: str, place: str) -> None:
    [problem] = refused("base.yaml", *sets)
    assert problem.span is not None
    assert (problem.code, problem.span.location) == (code, place)


def test_a_cycle_is_found_by_file_and_not_by_name(folder: Path) -> None:
    write("a.yaml", "extends: sub/../b.yaml\nset: {}\n")
    write("b.yaml", f"extends: {folder}/c.yaml\n")
    os.symlink("a.yaml", "c.yaml")
    Path("sub").mkdir()
    [problem] = refused("a.yaml")
    assert problem.code == "E112"
    assert problem.message.endswith(f"a.yaml -> b.yaml -> {folder}/c.yaml")


def test_the_same_base_twice_in_a_row_is_a_cycle_of_one() -> None:
    write("self.yaml", "extends: self.yaml\n")
    [problem] = refused("self.yaml")
    assert problem.message == "these specs extend each other: self.yaml -> self.yaml"


def test_problems_of_all_files_and_options_come_together() -> None:
    write(
        "top.yaml",
        "extends: base.yaml\nparams: {a: 1}\nset: {params.hidden_size.x: 1}\n"
        "variants: {odd: {architecture.layers.9: 1}, none: 3}\n",
    )
    problems = refused("top.yaml", "oops", variants=["smal"])
    assert [d.code for d in problems] == ["E115", "E113", "E118", "E114", "E114", "E302"]


@pytest.mark.parametrize("extends", ["[base.yaml]", "''", "{a: b}"])
def test_extends_is_a_path(extends: str) -> None:
    write("top.yaml", f"extends: {extends}\n")
    [problem] = refused("top.yaml")
    assert (problem.code, problem.message) == ("E302", "`extends` must be the path of a spec")


def test_keys_with_escapes_are_placed_whole() -> None:
    write("top.yaml", 'extends: base.yaml\nset: {"params.\\u0068idden_size.x": 1}\n')
    [problem] = refused("top.yaml")
    assert problem.span is not None
    assert problem.span.text == '"params.\\u0068idden_size.x"'
