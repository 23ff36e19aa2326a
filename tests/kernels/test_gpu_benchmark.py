"""`python benchmarks/gpu`: what it says without a GPU; its cases and checks on the CPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from backends.triton.kernel import Case
from tests.support.kernels import FILES, Kernels, files_of, package_of
from tests.support.places import ROOT

SMALL = 40_000
"""Numbers in the arguments of a case that is worth interpreting here."""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))
    return importlib.import_module("check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_claims_nothing() -> None:
    run = [sys.executable, "benchmarks/gpu"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no GPU here: no kernel was run, and nothing is claimed of their speed\n"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bf16", "fp8_blockwise"])
@pytest.mark.parametrize("name", FILES)
def test_cases_are_checked_against_the_reference(
    name: str, policy: str, kernels: Kernels, check: ModuleType
) -> None:
    """One small case of each function, interpreted; that of a wrong kernel is found out."""
    sets = (f"precision.policy={policy}",)
    spec = "deepseek_v3_tiny"
    listed = json.loads(package_of(spec, "sm_90", sets)["kernels/kernels.json"])["files"]
    for file in (one for one in listed if one["name"] == f"{name}.py"):
        module = kernels(name, spec, "sm_90", sets)
        seen: set[str] = set()
        for case in file["cases"]:
            if case["function"] in seen or numbers(case) > SMALL:
                continue
            seen.add(case["function"])
            kernel, reference = getattr(module, case["function"]), check.reference_of(file, case)
            assert check.checked(kernel, reference, case, "cpu") == "", case["name"]
            assert check.checked(broken(kernel), reference, case, "cpu"), case["name"]
        assert seen


def numbers(case: dict[str, Any]) -> int:
    shapes = [a["shape"] for a in case["arguments"] if isinstance(a, dict)]
    return sum(torch.Size(shape).numel() for shape in shapes)


def broken(kernel: Any) -> Any:
    """A kernel that leaves the last row of its last result out."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        results = kernel(*arguments, **keywords)
        last = results if isinstance(results, torch.Tensor) else results[-1]
        place = sum((n - 1) * step for n, step in zip(last.shape, last.stride(), strict=True))
        last.as_strided((1,), (1,), last.storage_offset() + place).view(torch.uint8)[-1:] ^= 0x7F
        return results

    return run


def test_every_case_says_what_it_moves() -> None:
    cases: list[Case] = [c for s in ("deepseek_v3",) for f in files_of(s, "sm_90") for c in f.cases]
    assert cases
    for case in cases:
        assert case.bytes > 0 and case.spans and case.name.startswith(case.function), case.name
        assert case.flops > 0 or case.unit == "memory", case.name
