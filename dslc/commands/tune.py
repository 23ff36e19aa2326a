"""`dslc tune`: the fastest tiles of each kernel, or libraries, on the GPU of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dslc.options import SetOption, SpecArgument, VariantOption

EXAMPLES = """
\b
Examples:
  dslc tune deepseek_v3 -o h800.json
  dslc build deepseek_v3 --target sm_90 --tuned h800.json

\b
Without it, a cost model of the GPU chooses tiles, which has not been compared with measurements,
and libraries serve the products and attentions at which they were faster on an H200.
"""


def run(
    spec: SpecArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")
    ] = Path("tuned.json"),
    sets: SetOption = None,
    variants: VariantOption = None,
) -> None:
    """Measure the candidates of each kernel, and libraries, and keep the fastest for `dslc build`.

    A library whose results are not those of the reference, twice in the same bits, never wins.
    """
    from backends.triton import tune
    from backends.triton.target import TARGETS
    from compiler.pipeline import compile
    from dsl.diagnostic import Diagnostic, DiagnosticError
    from dslc.installed import require_triton
    from dslc.report import reporting
    from dslc.specs import read

    with reporting():
        require_triton("measuring kernels")
        name, gpu = tune.gpu_here()
        if name not in TARGETS:
            why = f"measuring needs a GPU of {', '.join(TARGETS)}; this machine has {gpu}"
            help = "run it on the GPU of the model; builds without it use a cost model"
            raise DiagnosticError([Diagnostic("E608", why, help=help)])
        description = read(spec, sets, variants)
        rounds = []
        programs = compile(description).programs
        for one in tune.measure(programs, description, TARGETS[name], tune.on_gpu):
            rounds.append(one)
            print(f"candidate {len(rounds)} of {len(one.taken)} kernels measured", flush=True)
        output.write_text(tune.text_of(rounds, TARGETS[name], gpu), encoding="utf-8")
        print(f"wrote {output}: the fastest of {len(tune.winners(rounds))} kernels on {gpu}")
