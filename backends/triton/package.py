"""The folder `kernels/` of a build: the files that its programs need, and what serves what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import wrap

from backends.render import render
from backends.triton import (
    adamw,
    attention,
    balance,
    cross_entropy,
    cublas,
    deep_gemm,
    e5m6,
    embedding,
    flash_mla,
    fp8_cublas,
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
    sdpa,
    swiglu,
)
from backends.triton.instances import OpInstances
from backends.triton.kernel import MODULES, KernelFile
from backends.triton.libraries import with_libraries
from backends.triton.target import Target
from backends.triton.tuning_table import TuningTable, shipped
from compiler.graph.core import Program
from dsl.load import Description

FAMILIES = (
    attention,
    latent_attention,
    norm,
    rope,
    swiglu,
    gate,
    balance,
    permute,
    quantize,
    e5m6,
    fp8_linear,
    linear,
    fp8_grouped_linear,
    grouped_linear,
    cross_entropy,
    embedding,
    adamw,
)
"""Each has `kernel_file(instances, target)`: a file of kernels, or None where none is needed."""

LIBRARIES = tuple(module.LIBRARY for module in (deep_gemm, flash_mla, cublas, fp8_cublas, sdpa))
"""What is called instead of a kernel, where it is faster or asked for: it is asked first."""

CALLERS = {"optimizer": "functions"}
"""Who calls functions by another name: `runtime/train/optimizer.py` those of the optimizer."""


def kernel_files(
    programs: Mapping[str, Program],
    description: Description,
    target: Target,
    tuning: TuningTable | None = None,
) -> list[KernelFile]:
    """The libraries and families that a model needs, in the order of `LIBRARIES` and `FAMILIES`.

    `tuning` holds what was measured on a GPU, or else what is shipped does. Raises
    `DiagnosticError` if it does not fit.
    """
    table = tuning if tuning is not None else shipped(target.name)
    instances = OpInstances(programs, description, table)
    files = (family.kernel_file(instances, target) for family in FAMILIES)
    own = [file for file in files if file is not None]
    return with_libraries(own, LIBRARIES, instances, target)


def kernels_package(
    files: Sequence[KernelFile], target: Target, callers: str = ""
) -> dict[str, str]:
    """Texts by path inside the build. `callers` is the code that calls `F.rms_norm(..)`: what it
    calls is listed in `kernels/__init__.py` beside the functions that have a kernel."""
    functions = {name: _functions(name, files, callers) for name in MODULES}
    namespaces = {name: lines for name, lines in functions.items() if lines}
    texts = {f"kernels/{file.name}.py": file.text for file in files}
    texts["kernels/__init__.py"] = render(
        "triton/init.py.jinja",
        target=target,
        imports=sorted(f"from ..runtime import {MODULES[n]} as torch_{n}" for n in namespaces),
        modules=MODULES,
        namespaces=namespaces,
    )
    texts["kernels/kernels.json"] = _record(files, target)
    return texts


def _functions(namespace: str, files: Sequence[KernelFile], callers: str) -> list[str]:
    """A class of `kernels/__init__.py`: an assignment for each of its functions."""
    called = re.findall(rf"\b{CALLERS.get(namespace, namespace)}\.(\w+)[(,]", callers)
    paths = {f"{namespace}.{function}" for function in called}
    paths |= {p for file in files for p in file.serves if p.startswith(f"{namespace}.")}
    return [
        line
        for path in sorted(paths)
        for line in _assignment(path, [file for file in files if path in file.serves])
    ]


def _assignment(path: str, serving: Sequence[KernelFile]) -> list[str]:
    """`rms_norm = kernel(torch_F.rms_norm, torch.bfloat16, "norm")`, in 96 columns, below a comment
    that says when it is which of several files."""
    name, reference = path.rpartition(".")[2], f"torch_{path}"
    if not serving:
        return [f"{name} = {reference}"]
    comment = [
        line
        for file in serving
        if path in file.when
        for line in wrap(f"{file.name}: {file.when[path]}", 92, subsequent_indent="  ")
    ]
    dtype = f"torch.{serving[0].serves[path]}"
    operands = ", ".join([reference, dtype, *(f'"{file.name}"' for file in serving)])
    line = f"{name} = kernel({operands})"
    made = [line] if len(line) <= 96 else [f"{name} = kernel(", f"    {operands}", ")"]
    return [*(f"# {line}" for line in comment), *made]


def _record(files: Sequence[KernelFile], target: Target) -> str:
    content = {
        "target": target.name,
        "files": [
            {
                "name": f"{file.name}.py",
                **({"library": file.library} if file.library else {}),
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
