"""`dslc check`: all errors of a spec."""

from __future__ import annotations

from dslc.options import Format, FormatOption, SetOption, SpecArgument, VariantOption

EXAMPLES = """
\b
Examples:
  dslc check my_model.yaml
  dslc check my_model.yaml --variant small --set params.num_experts_per_tok=6
  dslc check my_model.yaml --format json      for editors and CI
"""


def run(
    spec: SpecArgument,
    sets: SetOption = None,
    variants: VariantOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Check a spec and show every error.

    Each comes with its place, cause and fix."""
    from compiler.pipeline import compile
    from compiler.plan.make import make_plan
    from dslc.report import print_json, reporting
    from dslc.specs import read

    with reporting(as_json=format is Format.json):
        description = read(spec, sets, variants)
        make_plan(description, compile(description))
        if format is Format.json:
            print_json({"ok": True, "diagnostics": []})
        else:
            print(f"{description.spec.model}: no errors found")
