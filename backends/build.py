"""A build: all files made in memory, then put in place at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import runtime
from backends import VERSION
from backends.render import render
from backends.report import render_report
from backends.torch.config import config_py
from backends.torch.extern import FOLDER, extern_files
from backends.torch.model import model_py
from backends.torch.records import docstring
from backends.torch.stages import stages_py
from backends.values import values
from compiler.analysis import Summary, summary
from compiler.graph.core import Graph
from compiler.graph.text import print_program
from compiler.lower.state import DTYPES
from compiler.pipeline import Compiled, compile, without_fp8
from compiler.plan.make import make_plan, step_counts
from compiler.plan.plan import Plan
from compiler.plan.ramp import longest, rounds
from compiler.plan.record import record
from compiler.plan.schedule import schedule
from compiler.plan.transfers import executed_schedule
from compiler.roles import roles
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.load import Description

if TYPE_CHECKING:
    from backends.triton.target import Target
    from backends.triton.tuning_table import TuningTable

GENERATOR = "dslc"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BuildResult:
    """Where a build lies and what it holds."""

    path: Path
    files: Mapping[str, int]
    summary: Summary
    plan: Plan | None
    seconds: float
    changed: bool
    left_to_torch: tuple[str, ...] = ()
    """With a target: operators of a kind that has kernels, which none of them serves."""
    missing: str = ""
    """The operator that keeps a build for CPUs from having a compiled step."""

    @property
    def user_code(self) -> list[str]:
        """The files that were written by the user of dslc, and run with the model."""
        generated = f"{FOLDER}/__init__.py"
        return [n for n in self.files if n.startswith(f"{FOLDER}/") and n != generated]


def build(
    description: Description,
    out: Path,
    *,
    skip: Collection[str] = (),
    until: str | None = None,
    target: Target | None = None,
    tuning: TuningTable | None = None,
    cpu: bool = False,
) -> BuildResult:
    """Writes the package of a model to `out`, which is replaced whole or left alone.

    With `target` it holds kernels for that GPU, too, cut as `tuning` says; with `cpu` a compiled
    step for serving, unless the model has operators that there is no C++ for.
    `skip` and `until` leave passes out, for debugging (`compiler.pipeline.select_passes`).
    Raises `DiagnosticError` for problems of the model (E4xx, E5xx) and of the folder (E6xx).
    """
    started = time.perf_counter()
    compiled = compile(description, skip=skip, until=until)
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    plan = make_plan(description, compiled)
    missing = ""
    step: Mapping[str, str] = {}
    if cpu:
        from backends.cpp.emit import Unsupported

        try:
            step = compiled_step(description, compiled, skip, until)
        except Unsupported as error:
            missing = str(error)
    files = package(description, compiled, numbers, plan, target, tuning, step)
    changed = install(files, out)
    sizes = {name: len(data) for name, data in files.items()}
    left: tuple[str, ...] = ()
    if target is not None:
        from backends.triton.instances import left_to_torch

        left = tuple(left_to_torch(compiled.programs))
    seconds = time.perf_counter() - started
    return BuildResult(out, sizes, numbers, plan, seconds, changed, left, missing)


def compiled_step(
    description: Description,
    compiled: Compiled,
    skip: Collection[str] = (),
    until: str | None = None,
) -> dict[str, str]:
    """The folder `cpu/` of a build. Raises `Unsupported` for what there is no C++ for.

    C++ reads FP8 weights as they are stored, and quantizes nothing else.
    """
    from backends.cpp.package import cpu_package

    if any(w.fp8 for graph in compiled.lowered.graphs.values() for w in graph.weights.values()):
        compiled = without_fp8(compiled, description, skip, until)
    return cpu_package(
        compiled,
        about=description.spec.about,
        spec=_spec_name(description),
        version=VERSION,
        dtype=DTYPES[description.spec.precision.policy],
    )


def _spec_name(description: Description) -> str:
    """The file of the spec; what was extended comes first."""
    return _file_name(description.composed.sources[-1].name)


def package(
    description: Description,
    compiled: Compiled,
    numbers: Summary,
    plan: Plan | None = None,
    target: Target | None = None,
    tuning: TuningTable | None = None,
    step: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Every file of a build by its path inside the package. Same inputs, same bytes.

    `step` is what `compiled_step` gives.
    """
    spec = _spec_name(description)
    facts = {"version": VERSION, "spec": spec}
    about = description.spec.about
    emitted: dict[str, Any] = {
        "dtype": DTYPES[description.spec.precision.policy],
        "params": {name: value.value for name, value in description.params.items()},
        "kernels": target is not None,
        **facts,
    }
    texts = {
        "__init__.py": render(
            "torch/init.py.jinja",
            about=docstring(about or spec),
            spec=docstring(spec),
            version=VERSION,
        ),
        "model.py": model_py(compiled, about=about, cpu=bool(step), **emitted),
        "config.py": config_py(description, compiled.lowered, plan, **facts),
        **(step or {}),
    }
    for name in ("train", "serve"):
        texts[f"{name}.py"] = render(
            f"torch/{name}.py.jinja",
            model=description.spec.model,
            spec=docstring(spec),
            version=VERSION,
        )
    texts |= extern_files(description, compiled.lowered, **facts)
    folder = Path(runtime.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        texts[f"runtime/{path.relative_to(folder).as_posix()}"] = path.read_text(encoding="utf-8")
    if target is not None:
        from backends.triton.package import kernel_files, kernels_package

        kernels = kernel_files(compiled.programs, description, target, tuning)
        callers = texts["model.py"] + texts["runtime/train/optimizer.py"]
        texts |= kernels_package(kernels, target, callers)
    printed: dict[Graph, str] = {}
    for i, one in enumerate(one for one in compiled.steps if one.changed):
        name = f"graph/{i:02d}-{one.program_name}-{one.name}.graph"
        texts[name] = print_program(one.program, printed=printed)
    for name, program in compiled.programs.items():
        texts[f"graph/{name}.graph"] = print_program(program, printed=printed)
    if plan is not None:
        values = record(description.spec.model, plan)
        texts["plan.json"] = json.dumps(values, indent=2) + "\n"
        found = list(roles(description, compiled.lowered, plan.layout))
        for role in found:
            texts[f"graph/rank-{role.name}.graph"] = role.text(role.program)
            texts[f"graph/rank-{role.name}-step.graph"] = role.text(role.step)
        layout = plan.layout
        mesh = layout.mesh
        # The kernels around experts know nothing yet of those on other ranks.
        if (mesh.expert > 1 and target is None) or (mesh.expert == 1 and mesh.pipeline > 1):
            stages = stages_py(description, compiled, layout, found, **emitted)
            texts |= {"stages.py": stages} if stages is not None else {}
        texts |= schedule_texts(description, plan)
    names = [*texts, "report.html", MANIFEST]
    texts["report.html"] = render_report(
        description, compiled, numbers, version=VERSION, files=names, plan=plan
    )
    files = {name: text.encode() for name, text in texts.items()}
    files[MANIFEST] = manifest(description, compiled, files)
    return files


def schedule_texts(description: Description, plan: Plan) -> dict[str, str]:
    """The schedule of a step, and one for each number of micro-batches that steps are made of."""
    layout, pipeline = plan.layout, plan.layout.mesh.pipeline
    order = schedule(layout.schedule, pipeline, layout.micro_batches)
    texts = {"graph/schedule.txt": str(order)}
    ways, most = len(layout.placement), longest(pipeline)
    counts = step_counts(description, layout)
    for size in sorted({size for count in counts for size in rounds(count, ways, most)}):
        steps = plan.order
        if size != steps.batches:
            steps = executed_schedule(layout.schedule, pipeline, size)
        texts[f"graph/schedule-{size}.json"] = steps.to_json()
    return texts


def manifest(description: Description, compiled: Compiled, files: Mapping[str, bytes]) -> bytes:
    """What went in, what came out, and through which passes."""
    content = {
        "generator": GENERATOR,
        "version": VERSION,
        "model": description.spec.model,
        "inputs": [
            {"name": _file_name(s.name), "sha256": _sha256(s.text.encode())}
            for s in description.sources
        ],
        "values": [
            {"path": v.path, "value": v.value, "origin": v.origin} for v in values(description)
        ],
        "passes": [f"{s.program_name}: {s.name}" for s in compiled.steps if s.changed],
        "outputs": {name: _sha256(data) for name, data in sorted(files.items())},
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def _file_name(name: str) -> str:
    """Without its folders, which differ from machine to machine."""
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def install(files: Mapping[str, bytes], out: Path) -> bool:
    """Puts a folder of `files` at `out`. False when it was there already, byte for byte.

    The folder is written under another name and renamed, so that it is never half there. Raises
    `DiagnosticError` when `out` holds something that a build did not write.
    """
    place = Path(os.path.abspath(out))
    try:
        if _found(place, out) == files:
            return False
        _replace(place, files)
    except OSError as error:
        raise DiagnosticError([_cannot_write(out, error)]) from None
    return True


def _replace(place: Path, files: Mapping[str, bytes]) -> None:
    """Leaves the old folder or the new one in any case, and nothing else."""
    beside = place.with_name(f".{place.name}.{os.getpid()}.new")
    old = place.with_name(f".{place.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        for name, data in files.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if place.exists():
            place.rename(old)
        beside.rename(place)
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _cannot_write(out: Path, error: OSError) -> Diagnostic:
    return Diagnostic(
        "E601",
        f"cannot write {out}: {error.strerror or error}",
        help="choose another folder with -o, or make room and permissions",
    )


def _found(place: Path, out: Path) -> dict[str, bytes]:
    """The files of the build at `place`; none where there is nothing, or an empty folder.

    Raises `DiagnosticError` for anything that a build did not write. `out` is how a person calls
    the place.
    """
    if not place.exists() and not place.is_symlink():
        return {}
    if place.is_symlink() or not place.is_dir():
        raise DiagnosticError([_foreign(out, "it is no folder")])
    paths = {
        p.relative_to(place).as_posix(): p
        for p in sorted(place.rglob("*"))
        if (p.is_symlink() or not p.is_dir()) and "__pycache__" not in p.parts[-2:-1]
    }
    outputs = _outputs(place)
    if paths and outputs is None:
        raise DiagnosticError([_foreign(out, "a build of dslc has a manifest.json of its own")])
    regular = {n: p for n, p in paths.items() if p.is_file() and not p.is_symlink()}
    found = {n: p.read_bytes() for n, p in regular.items() if n in (outputs or ()) or n == MANIFEST}
    own = {n for n, data in found.items() if n == MANIFEST or (outputs or {})[n] == _sha256(data)}
    changed = [name for name in paths if name not in own]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        why = f"it holds files that were added or changed: {', '.join(changed[:5])}{more}"
        raise DiagnosticError([_foreign(out, why)])
    return found


def _outputs(place: Path) -> dict[str, str] | None:
    """Hashes of the files that a build wrote by its own account; None where it is no build."""
    try:
        known = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return dict(known["outputs"]) if known["generator"] == GENERATOR else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _foreign(out: Path, why: str) -> Diagnostic:
    return Diagnostic(
        "E602",
        f"{out} is not overwritten: {why}",
        help="choose another folder with -o, or move this one away",
    )
