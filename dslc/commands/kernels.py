"""`dslc kernels`: the compiled kernels of a build, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dslc.options import (
    Format,
    FormatOption,
    SetOption,
    SpecArgument,
    TargetName,
    VariantOption,
)

EXAMPLES = """
\b
Examples:
  dslc kernels deepseek_v3 --target sm_90
  dslc kernels deepseek_v3 --target gfx942 --file norm
  dslc kernels deepseek_v3 --target sm_90 --save kernels    sources, PTX and SASS side by side

\b
The table is read from compiled code. The floor is the lower bound on time by the published peaks
of the GPU; nothing is run, and no speed is claimed.
Exit status 1 if a kernel breaks one of the rules for shipped kernels.
"""


def run(
    spec: SpecArgument,
    target: Annotated[
        TargetName, typer.Option(help="The GPU to compile for; the machine does not need one.")
    ],
    file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this file of kernels. Repeatable."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write sources and assembly to this folder.")
    ] = None,
    sets: SetOption = None,
    variants: VariantOption = None,
    format: FormatOption = Format.text,
) -> None:
    """Compile the Triton kernels of a model and show registers, memory, instructions."""
    from backends.triton.checks import violations
    from backends.triton.compiled import HEADINGS, CompilerFailed, compile_kernels, table
    from backends.triton.package import kernel_files, kernels_package
    from backends.triton.target import TARGETS
    from compiler.pipeline import compile
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dslc.installed import require_triton
    from dslc.passes import unknown
    from dslc.report import print_json, print_table, reporting
    from dslc.specs import read

    with reporting(as_json=format is Format.json):
        require_triton("compiling kernels")
        description = read(spec, sets, variants)
        gpu = TARGETS[target]
        found = kernel_files(compile(description).programs, description, gpu)
        files = [one for one in found if not one.library]
        known = [one.name for one in files]
        problems = [
            unknown("file of kernels", name, known) for name in file or () if name not in known
        ]
        if problems:
            raise DiagnosticError(problems)
        texts = kernels_package(files, gpu)
        files = [one for one in files if not file or one.name in file]
        try:
            rows = compile_kernels(files, texts, gpu, save)
        except CompilerFailed as error:
            raise DiagnosticError(
                [Diagnostic("E606", f"no kernel was compiled: {error}")]
            ) from None
        broken = [(row, text) for row in rows for text in violations(row, gpu)]
        if format is Format.json:
            print_json({"ok": not broken, "target": gpu.name, "kernels": rows})
        else:
            print_table([HEADINGS, *table(rows, gpu)], "<" * len(HEADINGS))
            for row, text in broken:
                print(f"{row['file']}: {row['kernel']} ({row['cases'][0]['name']}): {text}")
        if broken:
            raise typer.Exit(1)
