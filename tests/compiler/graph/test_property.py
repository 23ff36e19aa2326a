"""Random programs survive printing and reading, and no text makes the reader fall over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.graph.core import Program, copy_program
from compiler.graph.equal import first_difference
from compiler.graph.text import parse_program, print_program
from compiler.graph.verify import verify
from compiler.ops import OPS
from dsl.diagnostic import DiagnosticError, render
from dsl.source import Source
from tests.compiler.strategies import programs


@settings(max_examples=150)
@given(programs())
def test_random_programs_are_valid_and_read_back_equal(program: Program) -> None:
    verify(program)
    text = print_program(program)
    again = parse_program(Source("random.graph", text))
    assert first_difference(program, again) is None
    assert print_program(again) == text
    verify(again)
