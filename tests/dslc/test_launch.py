"""`dslc launch`: job files, and that ranks train by them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.support.command import Run
from tests.support.golden import Golden
from tests.support.places import TEXT, TINY
from tests.support.trained import lines

LAYOUT = "{cluster: cpu_2x2, pipeline: 2, expert: 2, batch: 8, sequence_length: 16}"
SMALL = ["--set", f"parallel={LAYOUT}", "--set", "train.sequence_length=16", "--set",
         "train.batch=8", "--set", "train.steps=1", "--set", "train.learning_rate=1e-3",
         "--set", "train.micro_batch=1"]  # fmt: skip


@pytest.mark.slow
def test_a_job_of_slurm(dslc: Run, golden: Golden) -> None:
    outcome = dslc("launch", "deepseek_v3", "--slurm", "--spare", "2")
    assert outcome.status == 0 and "258 nodes of 8" in outcome.out
    text = Path("deepseek_v3.slurm.sh").read_text()
    golden("cli/launch_slurm.txt", text)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for line in text.splitlines():
        assert not re.search("^#SBATCH.*#", line), "a comment that Slurm may read"


@pytest.mark.slow
def test_a_job_of_kubernetes(dslc: Run, golden: Golden) -> None:
    outcome = dslc("launch", "deepseek_v3", "--kubernetes", "--image", "registry/torch:2.13")
    assert outcome.status == 0
    text = Path("deepseek_v3.kubernetes.yaml").read_text()
    golden("cli/launch_kubernetes.txt", text)
    service, job = YAML(typ="safe").load_all(text)
    name, spec = service["metadata"]["name"], job["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod: Any = spec["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], pod["subdomain"]) == (256, 256, name)
    (container,) = pod["containers"]
    assert f"--rdzv-endpoint={name}-0.{name}:29500" in container["args"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert variables["NCCL_DEBUG"] == "WARN" and all(map(str, variables.values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [["--slurm"], ["--kubernetes", "--image", "x"]])
def test_every_variable_has_its_reason(dslc: Run, kind: list[str]) -> None:
    assert dslc("launch", "deepseek_v3", *kind, "-o", "job").status == 0
    found = Path("job").read_text().splitlines()
    of = re.compile(r"(NCCL|GLOO|TORCH|OMP|PYTORCH)_\w+(=|,)")
    named = [i for i, line in enumerate(found) if of.search(line)]
    assert len(named) == 11
    for i in named:
        assert re.match(r" *# \S+ \S+", found[i - 1]), found[i]


@pytest.mark.slow
def test_what_cannot_be_launched_is_refused(dslc: Run) -> None:
    assert dslc("launch", "deepseek_v3").status == 2
    assert dslc("launch", "deepseek_v3", "--slurm", "--kubernetes").status == 2
    assert "--image" in dslc("launch", "deepseek_v3", "--kubernetes").err
    assert "E532" in dslc("launch", TINY, "--slurm").err
    assert dslc("launch", TINY, "--slurm", *SMALL).status == 0
    again = dslc("launch", TINY, "--slurm", *SMALL)
    assert again.status == 1 and "E692" in again.err


@pytest.mark.slow
def test_a_job_of_slurm_trains(dslc: Run, tmp_path: Path) -> None:
    """Two nodes of two ranks, which are one machine here; srun and scontrol are stand-ins."""
    assert dslc("launch", TINY, "--slurm", "-o", "job.sh", *SMALL).status == 0
    assert dslc("build", TINY, "-o", "build/deepseek_v3_tiny", *SMALL).status == 0
    job = tmp_path / "job.sh"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job.write_text(job.read_text().replace("29500", str(free.getsockname()[1])))
    (tmp_path / "text.txt").write_bytes(TEXT.read_bytes()[:3000])
    programs = {
        "srun": 'for node in 0 1; do "$@" & nodes[node]=$!; done\n'
        "for node in 0 1; do wait ${nodes[node]} || exit 1; done",
        "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    of_slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    done = subprocess.run(
        ["bash", str(job), "--data", "text.txt"],
        env={**os.environ, "PATH": path, **of_slurm},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on cpu, 4 ranks" in done.stdout + done.stderr
    assert lines(tmp_path / "runs" / "deepseek_v3_tiny")[0]["step"] == 1
