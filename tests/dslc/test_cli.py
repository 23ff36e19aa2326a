"""The program around the commands: help, exit status, what becomes of faults."""

from __future__ import annotations

import ast
import keyword
import os
import re
import subprocess
import sys
import time

import pytest

from backends import VERSION
from tests.support.command import Run
from tests.support.places import ROOT

COMMANDS = (
    "check", "show", "plan", "dryrun", "calibrate", "doctor", "graph", "passes", "diff", "build",
    "kernels", "tune", "tokenizer", "train", "launch", "study", "eval", "generate", "serve",
    "bench-serve", "plot", "import", "export", "init", "schema", "ops", "explain",
)  # fmt: skip


def test_help_names_every_command_and_shows_examples(dslc: Run) -> None:
    outcome = dslc("--help")
    assert outcome.status == 0
    listed = outcome.out.split("Commands:")[1].split("Examples:")[0]
    assert re.findall(r"^  ([\w-]+) ", listed, re.M) == list(COMMANDS)
    assert "dslc build specs/deepseek_v3.yaml" in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_that_the_parser_takes(dslc: Run, command: str) -> None:
    outcome = dslc(command, "--help")
    assert outcome.status == 0
    shown = outcome.out.split("Examples:")[1]
    examples = re.findall(rf"^ +(dslc {command}.*?)(?:  .*)?$", shown, re.M)
    assert examples, outcome.out
    options = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", outcome.out.split("Examples:")[0]))
    used = {option for e in examples for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", e)}
    assert used <= options


def test_help_is_instant_and_loads_no_stage() -> None:
    program = "import sys, dslc.cli; dslc.cli.application(''); print(*sys.modules)"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, "ops"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    print(f"importing dslc.cli took {time.perf_counter() - start:.3f} s")
    loaded = set(done.stdout.split())
    heavy = {"pydantic", "lark", "ruamel.yaml", "jinja2", "compiler", "backends.build", "dsl.load"}
    assert "dslc.commands.build" in loaded
    assert not loaded & heavy


def test_a_command_does_not_load_the_others() -> None:
    program = "import sys, dslc.cli; dslc.cli.application('build'); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name for name in done.stdout.split() if name.startswith("dslc.commands.")}
    assert loaded == {"dslc.commands.build"}


def test_commands_import_stages_only_where_they_run() -> None:
    for command in COMMANDS:
        name = f"{command}_" if keyword.iskeyword(command) else command.replace("-", "_")
        path = ROOT / "dslc" / "commands" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [m for m in modules if m.split(".")[0] in ("dsl", "compiler", "backends")]


def test_version(dslc: Run) -> None:
    assert dslc("--version").out == f"dslc {VERSION}\n"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{VERSION}"' in project


@pytest.mark.parametrize(
    "arguments",
    [
        ("chek", "x.yaml"),
        ("check",),
        ("check", "x.yaml", "--colour"),
        ("show", "x", "--seq", "many"),
    ],
)
def test_wrong_usage_is_status_2(dslc: Run, arguments: tuple[str, ...]) -> None:
    outcome = dslc(*arguments)
    assert outcome.status == 2
    assert "Usage: dslc" in outcome.err and not outcome.out


def test_a_fault_of_dslc_says_so_and_shows_its_traceback_only_on_request(
    dslc: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("a bolt is loose")

    monkeypatch.setattr("dsl.schema.json_schema", broken)
    outcome = dslc("schema")
    assert outcome.status == 70
    assert "internal error: RuntimeError: a bolt is loose" in outcome.err
    assert "report" in outcome.err and "DSLC_DEBUG=1" in outcome.err
    monkeypatch.setenv("DSLC_DEBUG", "1")
    with pytest.raises(AssertionError, match="Traceback"):
        dslc("schema")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                      "15032385536 bytes. Error code 12"),
         "out of memory: 15.03 GB more could not be allocated"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total .."),
         "out of memory: 2.00 GiB more could not be allocated"),
    ],
)  # fmt: skip
def test_a_lack_of_memory_is_no_fault_of_dslc(
    dslc: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def hungry() -> dict[str, object]:
        raise error

    monkeypatch.setattr("dsl.schema.json_schema", hungry)
    outcome = dslc("schema")
    assert (outcome.status, outcome.out, outcome.err) == (1, "", f"dslc: {told}\n")


@pytest.mark.slow
def test_threads_wait_without_the_cores_that_others_need() -> None:
    """As the library of threads says itself when it is loaded."""
    program = (
        "import atexit, dslc.cli; atexit.register(lambda: __import__('torch')); dslc.cli.main()"
    )
    set_here = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    plain = {k: v for k, v in os.environ.items() if k not in set_here}
    for given, policy, turns in (
        ({}, "PASSIVE", 1000),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE", 7),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", 30_000_000_000),
    ):
        environment = {**plain, **given, "OMP_DISPLAY_ENV": "verbose"}
        done = subprocess.run(
            [sys.executable, "-c", program, "ops"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
        assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


def test_ctrl_c_is_status_130_and_silent(dslc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsl.schema.json_schema", interrupted)
    outcome = dslc("schema")
    assert (outcome.status, outcome.out, outcome.err.strip()) == (130, "", "")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m dslc schema | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        run = [sys.executable, "-m", "dslc", "schema"]
        done = subprocess.run(run, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "dslc: cannot write standard output: No space left on device\n"
