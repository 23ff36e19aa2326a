"""What generated classes share: no class, and no beginning of methods, is written twice."""

from __future__ import annotations

import ast
from collections import Counter
from itertools import takewhile

import pytest

from backends.torch.sizes import Sizes
from compiler.graph.types import Dim
from tests.support.generated import CASES, generated


class _Plain(ast.NodeTransformer):
    """Numbers, and names that stand for numbers, all alike."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(0) if isinstance(node.value, int | float) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return ast.Constant(0) if ast.unparse(node.value) == "p" else node


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_two_classes_differ_in_constants_only(case: str) -> None:
    tree = ast.parse(generated(case)["model.py"])
    bodies = Counter(
        ast.unparse(_Plain().visit(ast.Module(node.body[1:], [])))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    )
    assert len(bodies) > 2
    assert max(bodies.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_methods_of_a_class_do_not_begin_alike(case: str) -> None:
    """Five statements and more that all methods begin with are a method of their own."""
    for node in ast.parse(generated(case)["model.py"]).body:
        if not isinstance(node, ast.ClassDef) or node.name == "Model":
            continue
        methods = {f.name: f.body for f in node.body if isinstance(f, ast.FunctionDef)}
        named = [methods[n] for n in ("forward", "prefill", "decode") if n in methods]
        if len(named) > 1:
            lines = zip(*([ast.unparse(one) for one in body] for body in named), strict=False)
            alike = list(takewhile(lambda ones: len(set(ones)) == 1, lines))
            assert len(alike) < 5, (node.name, alike)


def test_the_same_sizes_are_called_by_their_names() -> None:
    sizes = Sizes(
        {"hidden_size": 64, "rope_theta": 10000, "a_eps": 1e-6, "b_eps": 1e-6, "on": True}
    )
    assert sizes.of(Dim("hidden_size", 64)) == "p.hidden_size"
    assert sizes.of(Dim("hidden_size", 128)) == "128"
    assert sizes.within({"width": "self.width"}).of(Dim("width", 7)) == "self.width"
    assert sizes.number("theta", 10000.0) == "p.rope_theta"
    assert sizes.number("eps", 1e-6) == "1e-06", "two parameters could be meant"
    assert sizes.number("on", True) == "True"
    assert sizes.number("scoring", "sigmoid") == '"sigmoid"'
