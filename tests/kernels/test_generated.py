"""Files of kernels as people will read them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backends.triton.package import kernels_package
from backends.triton.target import TARGETS
from tests.support.golden import Golden
from tests.support.kernels import COMPILED, FILES, files_of, package_of
from tests.support.places import ROOT

SPECS = sorted({spec for spec, _ in COMPILED})


def test_text(golden: Golden) -> None:
    """What V3 in FP8 needs: all but products of experts in bfloat16, and libraries that were faster
    on an H200."""
    files = [file.name for file in files_of("deepseek_v3", "sm_90")]
    assert files == ["fp8_cublas", "sdpa", *(f for f in FILES if f != "grouped_linear")]
    texts = package_of("deepseek_v3", "sm_90")
    for name in ("__init__", *files):
        golden(f"kernels/text/{name}.py.txt", texts[f"kernels/{name}.py"])


def test_targets_whose_files_are_not_interpreted_have_those_of_others() -> None:
    """But for numbers: of programs at a time."""
    texts = {
        target: {file.name: file.text for file in files_of("deepseek_v3", target)}
        for target in TARGETS
    }
    for name in ("gate", "balance", "permute"):
        assert len({files[name] for files in texts.values()}) == 1
    for name in ("norm", "quantize", "adamw", "swiglu", "rope", "cross_entropy"):
        one, other = (re.sub(r"\d+", "0", texts[target][name]) for target in ("sm_90", "sm_100"))
        assert one == other


def test_functions_without_a_kernel_are_those_of_runtime() -> None:
    files = files_of("deepseek_v3_tiny", "sm_90")
    code = "x = F.embedding(tokens, self.w)\nself.functions.clip_factor(x)\nF.rms_norm(x)"
    text = kernels_package(files, TARGETS["sm_90"], code)["kernels/__init__.py"]
    assert "    embedding = torch_F.embedding\n" in text
    assert "    clip_factor = torch_optimizer.clip_factor\n" in text
    assert '    rms_norm = kernel(torch_F.rms_norm, torch.bfloat16, "norm")\n' in text
    assert "positions" not in text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_generated_is_clean(spec: str, target: str, tmp_path: Path) -> None:
    """No unused or missing name, no long line, and laid out as ruff lays out code."""
    for path, text in package_of(spec, target).items():
        if path.endswith(".py"):
            (tmp_path / Path(path).name).write_text(text)
    for arguments in (
        ["check", "--select", "E,F,W,I001,B,SIM", "--ignore", "E741"],
        ["format", "--diff"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", arguments[0], "--isolated", "--line-length", "100",
             *arguments[1:], str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spec", SPECS)
def test_a_file_needs_torch_and_triton_alone(spec: str) -> None:
    for file in files_of(spec, "sm_90"):
        tree = ast.parse(file.text)
        used = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else name.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        }
        used = {name.split(".")[0] for name in used} - set(sys.stdlib_module_names)
        assert used <= {"torch", "triton"}, file.name


@pytest.mark.parametrize("spec", SPECS)
def test_every_launcher_serves_and_has_cases(spec: str) -> None:
    """Nothing is emitted that the spec does not need, and nothing is left unlooked at."""
    for file in files_of(spec, "sm_90"):
        public = {
            node.name
            for node in ast.parse(file.text).body
            if isinstance(node, ast.FunctionDef) and not node.decorator_list
        }
        served = {path.rpartition(".")[2] for path in file.serves}
        assert served <= public, file.name
        assert {case.function for case in file.cases} == served, file.name


def test_templates_are_more_text_than_tags() -> None:
    """Shape in the template, logic in Python: at most one line in five is a tag alone."""
    for path in sorted((ROOT / "backends/triton").glob("*.jinja")):
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        tags = [line for line in lines if line.startswith("{%")]
        assert len(tags) <= max(4, len(lines) / 5), f"{path.name}: {len(tags)} of {len(lines)}"
