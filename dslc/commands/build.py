"""`dslc build`: the package of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import (
    BuildTarget,
    Format,
    FormatOption,
    SetOption,
    SkipOption,
    SpecArgument,
    UntilOption,
    VariantOption,
)

if TYPE_CHECKING:
    from backends.build import BuildResult
    from backends.triton.target import Target
    from backends.triton.tuning_table import TuningTable

EXAMPLES = """
\b
Examples:
  dslc build specs/deepseek_v3.yaml                    writes build/deepseek_v3
  dslc build my_model.yaml --variant small -o build/small
  dslc build deepseek_v3 --set params.n_routed_experts=128 --set model=v3_128
  dslc build deepseek_v3 --target sm_90                with Triton kernels for that GPU
  dslc build deepseek_v3_tiny --target cpu             with its serving step in C++
  dslc build deepseek_v3 --skip fuse_experts -o build/loop    without one of the passes

\b
Use the result where build/ is on sys.path; it needs torch and safetensors, but not dslc:
  import deepseek_v3_tiny
  model = deepseek_v3_tiny.Model(device="cpu")
"""


def run(
    spec: SpecArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="The folder to write; build/MODEL by default."
        ),
    ] = None,
    target: Annotated[
        BuildTarget | None,
        typer.Option(
            help="Add Triton kernels for this GPU, or a compiled step for serving on CPUs; other "
            "devices run plain torch."
        ),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The output of `dslc tune`; needs --target."),
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
    skip: SkipOption = None,
    until: UntilOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Write a model as a package of readable torch code.

    The package runs without dslc. It is written completely or not at all, and never replaces a
    folder that dslc did not write.
    """
    from backends.build import build
    from backends.triton.target import TARGETS
    from dslc.passes import check
    from dslc.report import print_json, reporting
    from dslc.specs import read

    with reporting(as_json=format is Format.json):
        check(skip, until)
        description = read(spec, sets, variants)
        out = output or Path("build") / description.spec.model
        gpu = TARGETS.get(target) if target is not None else None
        result = build(
            description,
            out,
            skip=skip or (),
            until=until,
            target=gpu,
            tuning=measured(tuned, gpu),
            cpu=target is BuildTarget.cpu,
        )
        if format is Format.json:
            files = dict(result.files)
            found = {"folder": str(out), "files": files, "user_code": result.user_code}
            if result.missing:
                found["no_cpp"] = result.missing
            print_json({"ok": True, "diagnostics": [], **found})
        else:
            print("\n".join(summary_lines(result)))


def measured(tuned: Path | None, target: Target | None) -> TuningTable | None:
    """The choices in the file of `--tuned`. Raises `DiagnosticError`."""
    if tuned is None:
        return None

    from backends.triton import tuning_table
    from dsl.diagnostic import Diagnostic, DiagnosticError

    if target is None:
        why = "--tuned chooses between kernels, which only a build with --target has"
        raise DiagnosticError([Diagnostic("E607", why, help="add --target")])
    return tuning_table.tuned(tuned, target.name)


def summary_lines(result: BuildResult) -> list[str]:
    """A summary of the build as text."""
    from dsl.units import format_count
    from dslc.specs import shown

    numbers = result.summary
    parameters, active = format_count(numbers.parameters), format_count(numbers.activated)
    lines = [f"{numbers.name}: {parameters} parameters, {active} active per token"]
    if result.changed:
        kilobytes = sum(result.files.values()) // 1000
        lines.append(
            f"wrote {shown(result.path)}: {len(result.files)} files, {kilobytes:,} KB, "
            f"in {result.seconds:.2f} s"
        )
    else:
        lines.append(f"{shown(result.path)} is up to date")
    if result.left_to_torch:
        lines.append(f"no kernel serves {'; '.join(result.left_to_torch)}: torch's own code runs")
    if result.missing:
        lines.append(f"torch computes its served steps: there is no C++ for {result.missing}")
    if result.user_code:
        lines.append(
            f"it includes code of yours, which runs with it: {', '.join(result.user_code)}"
        )
    if result.plan is not None and not result.plan.fits:
        cluster = result.plan.cluster.cluster
        lines.append(
            f"its plan does not fit {cluster}; `dslc plan --why` lists the largest tensors"
        )
    return lines
