"""`python benchmarks/gpu`: what it says without a GPU; its cases and checks on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from backends.triton.agreement import checked, reference_of
from backends.triton.arguments import read, without_memory
from backends.triton.kernel import Case
from backends.triton.target import TARGETS
from tests.support.kernels import FILES, KernelLoader, files_of, package_of
from tests.support.places import ROOT

SMALL = 40_000
"""Numbers in the arguments of a case that is worth interpreting here."""


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
    name: str, policy: str, kernels: KernelLoader
) -> None:
    """One small case of each function, interpreted; that of a wrong kernel is found out."""
    sets = (f"precision.policy={policy}", "train.saved_formats={attention: e5m6, experts: fp8}")
    spec = "deepseek_v3_tiny"
    listed = json.loads(package_of(spec, "sm_90", sets)["kernels/kernels.json"])["files"]
    for file in (one for one in listed if one["name"] == f"{name}.py"):
        module = kernels(name, spec, "sm_90", sets)
        seen: set[str] = set()
        for case in file["cases"]:
            if case["function"] in seen or numbers(case) > SMALL:
                continue
            seen.add(case["function"])
            kernel, reference = getattr(module, case["function"]), reference_of(file, case)
            assert checked(kernel, reference, case, "cpu") == "", case["name"]
            assert checked(broken(kernel), reference, case, "cpu"), case["name"]
        assert seen


@pytest.mark.slow
def test_cases_of_documents_are_checked(kernels: KernelLoader) -> None:
    """With a window: their positions, results and log-sum-exp are those of the reference."""
    sets = ("train.document_mask=true", "sequence.eos_token_id=1", "params.window=5")
    spec, seen = "deepseek_v3_tiny", set()
    listed = json.loads(package_of(spec, "sm_90", sets)["kernels/kernels.json"])["files"]
    (file,) = (one for one in listed if one["name"] == "attention.py")
    module = kernels("attention", spec, "sm_90", sets)
    for case in file["cases"]:
        if case["function"].startswith("document") and numbers(case) <= SMALL:
            seen.add(case["function"])
            assert case["keywords"] == {"window": 5}
            kernel, reference = getattr(module, case["function"]), reference_of(file, case)
            assert checked(kernel, reference, case, "cpu") == "", case["name"]
    assert len(seen) == 3


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/gpu/__main__.py`, with a clock that stands still."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))
    path = ROOT / "benchmarks/gpu/__main__.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.import_module("cases"), "timed", lambda run: (run(), 2.0)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "no GPU")
    return module


def test_a_row_is_a_time_with_libraries_or_a_failure(
    benchmark: ModuleType, kernels: KernelLoader, tmp_path: Path
) -> None:
    sets = ("precision.policy=bf16",)
    listed = json.loads(package_of("deepseek_v3_tiny", "sm_90", sets)["kernels/kernels.json"])
    (file,) = (file for file in listed["files"] if file["name"] == "attention.py")
    module = kernels("attention", "deepseek_v3_tiny", "sm_90", sets)
    case = min((c for c in file["cases"] if c["function"] == "attention"), key=numbers)
    report = benchmark.Report("deepseek_v3_tiny", TARGETS["sm_90"], tmp_path)
    report.add(benchmark.row_of(module, file, case, TARGETS["sm_90"], "cpu"))
    empty = types.ModuleType("empty")
    report.add(benchmark.row_of(empty, file, case, TARGETS["sm_90"], "cpu"))
    timed, failed = json.loads((tmp_path / "gpu_report.json").read_text())["rows"]
    assert timed["check"] == "ok" and timed["us"] == timed["peers_us"]["SDPA"] == 2.0
    assert "RuntimeError" in timed["peers_us"]["SDPA cuDNN"]  # it is refused on a CPU
    assert failed["check"].startswith("AttributeError") and "us" not in failed
    assert (tmp_path / "gpu_report.md").read_text().count(case["name"]) == 2


def test_peers_are_called_as_they_are_declared(benchmark: ModuleType) -> None:
    """Each case of V3 binds to its reference; those with libraries have the arguments of these."""
    named: dict[str, set[str]] = {}
    peers = importlib.import_module("peers")
    for file in json.loads(package_of("deepseek_v3", "sm_90")["kernels/kernels.json"])["files"]:
        for case in file["cases"]:
            arguments, keywords = read(case, without_memory)
            reference = reference_of(file, case)
            bound = inspect.signature(reference).bind(*arguments, **keywords).arguments
            names = [name for name, _ in peers.peers_of(case["function"], bound)]
            named.setdefault(case["function"], set()).update(names)
    assert named["linear"] == {"cuBLAS bf16", "cuBLAS fp8"}
    assert named["grouped_linear"] == {"grouped_mm bf16"}
    assert named["attention"] == {"SDPA", "SDPA cuDNN", "SDPA flash"}


def test_the_longest_case_of_each_function_comes_first(benchmark: ModuleType) -> None:
    listed = json.loads(package_of("deepseek_v3", "sm_90")["kernels/kernels.json"])["files"]
    cases = [(file, case) for file in listed for case in file["cases"]]
    order = benchmark.by_importance(cases, TARGETS["sm_90"])
    functions = [f"{file['name']}: {case['function']}" for file, case in order]
    count = len(set(functions))
    assert len(set(functions[:count])) == count and len(order) == len(cases)
    assert order[0][1]["bytes"] > 1e9


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
        assert case.flops > 0 or case.bound_by == "memory", case.name
