"""`dslc study`: configurations of one spec, each trained with several seeds, and compared."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dslc.options import Format, FormatOption
from dslc.report import note

if TYPE_CHECKING:
    from dsl.study import Study
    from dslc.study.plan import Planned, StudyRun
    from dslc.study.report import Findings
    from dslc.study.run import Result

    Results = dict[StudyRun, Result | None]

EXAMPLES = """
\b
Examples:
  dslc study specs/studies/mtp_depth.yaml --plan          the runs, with their sizes; nothing starts
  dslc study specs/studies/mtp_depth.yaml --out studies/mtp
  dslc study specs/studies/mtp_depth.yaml --out studies/mtp      resumes where it was stopped
  dslc study study.yaml --out studies/mine --jobs 2       two runs at a time, half of the cores each
  dslc study study.yaml --out studies/mine --slurm        writes studies/mine/array.sh instead

\b
Ctrl-C saves the runs in progress and leaves; the same command resumes them. Exit status: 0 all runs
have ended, 1 a run failed (the others were run) or the study is wrong, 130 interrupted.
"""


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study file.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the study [studies/NAME].")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs and start none.")] = False,
    only: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Run number N alone, for array jobs.")
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Write array.sh, a Slurm array job, and start none.")
    ] = False,
    format: FormatOption = Format.text,
) -> None:
    """Train every configuration of a study with every seed and compare them by paired tests."""
    from dsl.study import read_study
    from dslc.report import print_json, print_table, reporting
    from dslc.specs import shown
    from dslc.study.plan import plan_study, runs_of
    from dslc.study.report import Findings
    from dslc.study.run import read_result

    as_json = format is Format.json
    with reporting(as_json=as_json):
        read = read_study(study)
        folder = out or Path("studies") / read.file.study
        planned = plan_study(read, folder)
        runs = runs_of(planned, read.file.seeds, folder)
        if only is not None and only >= len(runs):
            raise typer.BadParameter(f"--only {only}: the runs are 0 to {len(runs) - 1}")
        results: Results = {one: result for one in runs if (result := read_result(one)) is not None}
        if not as_json:
            print_table(plan_rows(planned), "<>>>>")
            print(summary_line(read, runs, results))
        if slurm:
            print(f"wrote {shown(write_array(study, folder, len(runs)))}")
        if plan and as_json:
            print_json(Findings(read, planned, runs, {}).to_json())
        if plan or slurm:
            return
        left = [one for one in (runs if only is None else [runs[only]]) if one not in results]
        interrupted = not complete(read, left, jobs, results, silent=as_json)
        found = Findings(read, planned, runs, {one: results[one] for one in runs if one in results})
        if only is None and results:
            publish(folder, found, as_json)
    if interrupted:
        note(
            f"stopped: {len(results)} of {len(runs)} runs have ended, the others are saved; the "
            "same command resumes them"
        )
        raise typer.Exit(128 + signal.SIGINT)
    raise typer.Exit(1 if found.failed else 0)


def complete(
    study: Study, left: Sequence[StudyRun], jobs: int, results: Results, silent: bool
) -> bool:
    """Trains what is left and adds the results; False if a signal stopped it."""
    from dslc.study.run import Runner

    begin = time.monotonic()
    runner = Runner(study, jobs)
    for done, (one, result) in enumerate(runner.all(left), 1):
        results[one] = result
        if not silent:
            print(ended_line(one, result, done, left, time.monotonic() - begin), flush=True)
    return not runner.signals


def publish(folder: Path, found: Findings, as_json: bool) -> None:
    """Writes study.html, results.csv and results.json, and prints the table or the JSON."""
    from backends import VERSION
    from dslc.report import print_json, print_table
    from dslc.specs import shown
    from runtime.files import replace_text

    texts = {
        "study.html": found.page(VERSION),
        "results.csv": found.csv(),
        "results.json": json.dumps(found.to_json(), indent=2) + "\n",
    }
    for name, text in texts.items():
        replace_text(folder / name, text)
    if as_json:
        print_json(found.to_json())
    else:
        print_table(found.table(), "<>>>><")
        print("wrote " + ", ".join(shown(folder / name) for name in texts))


def plan_rows(planned: Sequence[Planned]) -> list[tuple[str, ...]]:
    """The configurations with their sizes, a head first."""
    from backends.report.html import quantity
    from dsl.units import format_count

    head = ("configuration", "parameters", "active", "tokens", "training FLOPs")
    return [head, *(
        (one.name, format_count(one.parameters), format_count(one.active_parameters),
         format_count(one.tokens), quantity(one.flops, "FLOP"))
        for one in planned
    )]  # fmt: skip


def summary_line(study: Study, runs: Sequence[StudyRun], results: Results) -> str:
    """How many runs there are, and how long those that are left take by those that have ended."""
    from backends.report.html import quantity
    from dslc.study.report import clock

    seeds = ", ".join(map(str, study.file.seeds))
    flops = sum(run.planned.flops for run in runs)
    line = f"{len(runs)} runs with seeds {seeds}: {quantity(flops, 'FLOP')}"
    ended = [(run.planned.flops, result.seconds) for run, result in results.items() if result]
    if not ended:
        return f"{line}; the time is known when the first run has ended"
    rate = sum(flops for flops, _ in ended) / sum(seconds for _, seconds in ended)
    left = sum(run.planned.flops for run in runs if run not in results) / rate
    return f"{line}; {len(ended)} have ended, the others need about {clock(left)} of one process"


def ended_line(
    run: StudyRun, result: Result | None, done: int, left: Sequence[StudyRun], spent: float
) -> str:
    """One run that ended, and how long the rest will take at this rate."""
    from dslc.specs import shown
    from dslc.study.report import clock
    from dslc.study.run import log_of

    head = f"[{done}/{len(left)}] {run.name}: "
    share = done / len(left)
    rest = f"; about {clock(spent * (1 - share) / share)} left" if done < len(left) else ""
    if result is None:
        log = log_of(run)
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        return f"{head}failed: {last} ({shown(log)}){rest}"
    return f"{head}held-out loss {result.loss:.4f}, {clock(result.seconds)}{rest}"


def write_array(study: Path, folder: Path, runs: int) -> Path:
    """A Slurm array job with one task a run; the page is made by `dslc study` afterwards."""
    command = f"dslc study {shlex.quote(os.path.relpath(study))} --out {shlex.quote(str(folder))}"
    path = folder / "array.sh"
    path.write_text(
        "#!/usr/bin/env bash\n"
        "# One task for each run. When all have ended, the same command without --only compares\n"
        f"# them: {command}\n"
        f"#SBATCH --job-name={folder.name}\n"
        f"#SBATCH --array=0-{runs - 1}\n"
        "set -euo pipefail\n"
        f"cd {shlex.quote(str(Path.cwd()))}\n"
        f'{command} --only "$SLURM_ARRAY_TASK_ID"\n',
        encoding="utf-8",
    )
    return path
