"""`benchmarks/gpu/everything.py`: its runner, its pages, and its steps, as far as a CPU goes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from backends.triton.target import TARGETS
from backends.triton.tuning_table import read
from tests.support.places import ROOT


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/gpu"))
    return importlib.import_module("everything")


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_rows_come_as_they_are_printed_and_noise_is_left_out(everything: ModuleType) -> None:
    text = "print('{\"row\": \"a\"}'); print('noise'); print('[1]'); print('{\"row\": \"b\"}')"
    assert list(everything.rows_of(program(text), 30)) == [{"row": "a"}, {"row": "b"}]


def test_a_step_that_crashes_is_a_row(everything: ModuleType) -> None:
    text = "print('{\"row\": \"a\"}', flush=True); raise ValueError('no such unit')"
    *rows, last = everything.rows_of(program(text), 30)
    assert rows == [{"row": "a"}]
    assert last["failed"] == "exit status 1: ValueError: no such unit"


def test_a_step_that_hangs_is_stopped_with_all_that_it_started(
    everything: ModuleType, tmp_path: Path
) -> None:
    text = f"""echo '{{"row": "a"}}'; (sleep 2.5; touch {tmp_path}/file) & sleep 60"""
    start = time.monotonic()
    rows = list(everything.rows_of(["sh", "-c", text], 1.0))
    assert rows == [{"row": "a"}, {"row": "the step", "failed": "stopped at its limit of 1 s"}]
    assert time.monotonic() - start < 10
    time.sleep(max(0.0, start + 3.5 - time.monotonic()))
    assert not (tmp_path / "file").exists()


CONTENT: dict[str, Any] = {
    "target": "sm_90",
    "spec": "v3",
    "commit": "abc",
    "command": "python it",
    "gpu": "a GPU",
    "torch": "2",
    "triton": "3",
    "steps": [
        {
            "step": "ceilings",
            "rows": [
                {"row": "copy", "of": "bandwidth", "a_second": 4e12},
                {"row": "bf16 product", "of": "bf16", "a_second": 8e14},
            ],
        },
        {
            "step": "kernels",
            "rows": [
                {
                    "row": "linear 8x8 m1", "file": "linear", "size_key": "F.linear 8x8 m1",
                    "bytes": 4_000_000, "flops": 1, "bound_by": "bf16", "us": 2.0, "check": "ok",
                    "peers_us": {"cuBLAS": 4.0, "other": "it failed"},
                },
                {"row": "linear 8x8 m1", "file": "cublas", "size_key": "F.linear 8x8 m1", "us": 1.5,
                 "check": "ok", "bound_by": "bf16"},
                {"row": "linear 8x8 m1", "file": "wrong", "size_key": "F.linear 8x8 m1", "us": 0.5,
                 "check": "two runs differ", "bound_by": "bf16"},
            ],
        },
        {"step": "models", "rows": [{"row": "the step", "failed": "stopped at its limit"}]},
    ],
}  # fmt: skip


def test_the_page_has_every_row_and_shares_of_what_the_card_gives(everything: ModuleType) -> None:
    text = everything.page(CONTENT)
    assert "# v3 on a GPU, torch 2, Triton 3" in text
    assert "| linear 8x8 m1 | linear | 2.0 | 50% | ok | cuBLAS x2.00, other it failed |" in text
    assert "- the step: failed stopped at its limit" in text


def test_winners_are_what_a_build_reads(everything: ModuleType, tmp_path: Path) -> None:
    """The fastest that was right."""
    (tmp_path / "tuned.json").write_text(everything.tuned(CONTENT))
    assert read(tmp_path / "tuned.json", "sm_90").measured == {"F.linear 8x8 m1": "cublas"}


STAND_IN = """
import torch

class Model(torch.nn.Linear):
    config = type("Config", (), {"params": type("Params", (), {"vocab_size": 9})})

    def __init__(self, device, dtype, seed):
        super().__init__(4, 1, device=device, dtype=torch.float32)
        torch.nn.init.ones_(self.weight)

    def loss(self, tokens, labels):
        return type("Loss", (), {"total": self.weight.sum() * labels.float().mean()})

    def generate(self, tokens, max_new_tokens, temperature):
        return torch.cat([tokens, tokens[:, :1]], 1)
"""


def test_steps_run_where_dslc_is_not(everything: ModuleType, tmp_path: Path) -> None:
    """In processes that have no pydantic, lark, jinja2 or networkx: the card, and a small model,
    for which another stands in."""
    folder, out, blocked = (tmp_path / name for name in ("prepared", "out", "blocked"))
    (folder / "packages/small_bf16").mkdir(parents=True)
    (folder / "packages/small_bf16/__init__.py").write_text(STAND_IN)
    facts = {"target": "sm_90", "spec": "stand_in", "commit": ""}
    (folder / "prepared.json").write_text(json.dumps(facts))
    for name in ("pydantic", "lark", "jinja2", "networkx", "ruamel", "typer"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not installed there')")
    run = [sys.executable, "benchmarks/gpu/everything.py", str(folder), "--device", "cpu"]
    done = subprocess.run(
        [*run, "--only", "ceilings", "small", "--minutes", "9", "--out", str(out)],
        cwd=ROOT, env={"PYTHONPATH": str(blocked), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {s["step"]: s["rows"] for s in json.loads((out / "gpu.json").read_text())["steps"]}
    found = [row["of"] for row in steps["ceilings"] if "a_second" in row]
    assert found[:2] == ["bandwidth", "bf16"]
    assert [row.get("check", row) for row in steps["small"]] == ["ok"]
    assert "# stand_in on cpu" in (out / "gpu.md").read_text()


def test_preparing_writes_every_library_at_every_size(
    everything: ModuleType, tmp_path: Path
) -> None:
    spec = str(ROOT / "specs/deepseek_v3_tiny.yaml")
    everything.main(["--prepare", str(tmp_path), "--spec", spec, "--only", "libraries"])
    record = json.loads((tmp_path / "kernels/bf16/kernels.json").read_text())
    sizes = {
        file["name"]: {case["size_key"] for case in file["cases"] if "size_key" in case}
        for file in record["files"]
    }
    own = sizes["linear.py"] | sizes["grouped_linear.py"]
    assert sizes.keys() == {"cublas.py", "linear.py", "grouped_linear.py"}
    assert sizes["cublas.py"] == own and len(own) > 10
    assert (tmp_path / "kernels/fp8/fp8_linear.py").is_file() and (
        tmp_path / "prepared.json"
    ).is_file()


def test_a_small_model_that_differs_is_found_out(
    everything: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = importlib.import_module("small")
    grads, tokens = {"w": torch.ones(4)}, torch.tensor([[1, 2]])
    reference = (2.0, grads, tokens)

    def check(found: Any, again: Any = None) -> str:
        outcomes = iter((found, again or found, reference))
        monkeypatch.setattr(small, "outcome", lambda module, device: next(outcomes))
        return str(small.compare("json", "bf16", "gpu")["check"])

    assert check(reference) == "ok"
    assert check((2.1, grads, tokens)) == "the loss differs"
    assert check((float("nan"), grads, tokens)) == "the loss differs, two runs differ"
    assert check((2.0, {"w": torch.full((4,), 1.1)}, tokens)) == "gradients differ"
    assert check((2.0, {}, tokens)) == "gradients differ"
    assert check((2.0, grads, tokens + 1)) == "greedy tokens differ"
    assert check(reference, (2.0, {"w": torch.ones(4) * 1.001}, tokens)) == "two runs differ"


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_small_model_on_a_gpu_equals_that_of_the_cpu(
    precision: str, everything: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients, greedy tokens, twice the same bits: with the kernels of this GPU."""
    from runtime.dispatch import name_of

    if name_of(0) not in TARGETS:
        pytest.skip(f"dslc has no kernels for {name_of(0)}")
    folder = str(tmp_path)
    everything.main(["--prepare", folder, "--target", name_of(0), "--only", "small"])
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    found = importlib.import_module("small").compare(f"small_{precision}", precision, "cuda")
    assert found["check"] == "ok", found
