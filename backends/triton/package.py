"""The folder `kernels/` of a build: the files that its programs need, and what serves what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from backends.render import render
from backends.triton import (
    adamw,
    attention,
    balance,
    cross_entropy,
    deep_gemm,
    flash_mla,
    fp8_grouped_linear,
    fp8_linear,
    gate,
    grouped_linear,
    latent_attention,
    linear,
    norm,
    permute,
    quantize,
    rope,
    swiglu,
)
from backends.triton.choices import Choices
from backends.triton.kernel import KernelFile
from backends.triton.target import Target
from backends.triton.uses import Uses
from compiler.graph.core import Program
from dsl.load import Description

FAMILIES = (
    deep_gemm,
    flash_mla,
    attention,
    latent_attention,
    norm,
    rope,
    swiglu,
    gate,
    balance,
    permute,
    quantize,
    fp8_linear,
    linear,
    fp8_grouped_linear,
    grouped_linear,
    cross_entropy,
    adamw,
)
"""Each has `kernel_file(uses, target)`: a file of kernels, or None where no operator needs it.
Where two serve a function the earlier one is asked first: libraries stand before own kernels."""

MODULES = {"F": "functional", "G": "gradients", "fp8": "fp8", "optimizer": "optimizer"}
"""What `model.py` calls the modules of `runtime/` whose functions kernels replace."""


def kernel_files(
    programs: Mapping[str, Program],
    description: Description,
    target: Target,
    choices: Choices | None = None,
) -> list[KernelFile]:
    """The families that a model needs, in the order of `FAMILIES`.

    `choices` holds what was measured on a GPU. Raises `DiagnosticError` if it does not fit.
    """
    uses = Uses(programs, description, choices or Choices())
    files = (family.kernel_file(uses, target) for family in FAMILIES)
    return [file for file in files if file is not None]


def kernels_package(files: Sequence[KernelFile], target: Target) -> dict[str, str]:
    """Texts by path inside the build."""
    texts = {f"kernels/{file.name}.py": file.text for file in files}
    served = {module: _served(files, module) for module in MODULES}
    modules = {module: _mapping(functions) for module, functions in served.items()}
    texts["kernels/__init__.py"] = render("triton/init.py.jinja", target=target, modules=modules)
    texts["kernels/kernels.json"] = _record(files, target)
    return texts


def write(texts: Mapping[str, str], folder: Path) -> None:
    """The files of `kernels_package` side by side in a folder, to be compiled or run from there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        (folder / Path(path).name).write_text(text, encoding="utf-8")


def _served(files: Sequence[KernelFile], module: str) -> dict[str, tuple[str, list[str]]]:
    """Function: the element type that its kernel takes, and the files that have one, in order."""
    served: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        for path, dtype in file.serves.items():
            place, _, function = path.partition(".")
            if place == module:
                served.setdefault(function, (dtype, []))[1].append(file.name)
    return dict(sorted(served.items()))


def _mapping(functions: Mapping[str, tuple[str, list[str]]]) -> str:
    """Functions with element types and files, as Python text."""
    if not functions:
        return "{}"
    lines = [
        f'    "{name}": (torch.{dtype}, {json.dumps(files)}),'
        for name, (dtype, files) in functions.items()
    ]
    return "\n".join(["{", *lines, "}"])


def _record(files: Sequence[KernelFile], target: Target) -> str:
    content = {
        "target": target.name,
        "files": [
            {
                "name": f"{file.name}.py",
                "sha256": hashlib.sha256(file.text.encode()).hexdigest(),
                "serves": sorted(file.serves),
                "cases": [_case(asdict(case)) for case in file.cases],
            }
            for file in files
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _case(values: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if value not in ((), {}, 0, "")}
