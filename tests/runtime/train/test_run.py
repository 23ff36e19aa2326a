"""Whole runs of a built package: started, stopped, killed, damaged, gone on with."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.train.interrupt import run_lock
from runtime.train.tokens import Tokens
from tests.support.places import TEXT
from tests.support.trained import STEPS, built, content, curve, lines, part


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(TEXT.read_bytes()[:3000])
    return file


def train(package: Any, out: Path, *arguments: str | Path) -> int:
    words = ["--out", str(out), "--save-every", "2", *map(str, arguments)]
    status: int = part(package, "command").main(package.Model, words)
    return status


@pytest.fixture(scope="module")
def whole(package: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(package, out, "--data", text, "--eval-every", "3") == 0
    return out


def test_a_run_holds_what_happened(package: Any, whole: Path) -> None:
    steps = [line for line in lines(whole) if "loss" not in line and "main" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in steps] == [96 * n for n in range(1, 7)]
    assert steps[-1]["main"] < steps[0]["main"]
    assert {"max_vio", "entropy", "bias_range", "load"} == set(
        steps[0]["experts"]["model.layers.1.mlp"]
    )
    held_out = [line["held_out"] for line in lines(whole) if "held_out" in line]
    assert len(held_out) == 2
    # Bytes are tokens, hence bits per byte are nats per token in another unit.
    assert held_out[-1]["bits_per_byte"] == pytest.approx(held_out[-1]["loss"] / 0.6931472)
    # 300 bytes are held out: 18 sequences of 16.
    assert held_out[-1]["tokens"] == 18 * 16
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000006",
    ]


def test_tensorboard_shows_each_step_of_a_run_once(
    package: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    assert train(package, out) == 0  # makes the last two steps again
    steps = [line for line in lines(out) if "main" in line]
    for name in ("main", "gradient_norm", "tokens"):
        assert curve(out, name) == pytest.approx({s["step"]: s[name] for s in steps})
    tests = {s["step"]: s["held_out"]["acceptance"][0] for s in lines(out) if "held_out" in s}
    assert curve(out, "held_out/acceptance/1") == pytest.approx(tests)


def test_a_run_needs_nothing_but_its_folder(whole: Path, tmp_path: Path) -> None:
    """Moved elsewhere, its own package loads its own weights."""
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    program = (
        "from pathlib import Path; import tiny_trained as t;"
        "import tiny_trained.runtime.train.command as c;"
        "print(c.evaluate(t.Model, Path('.'), False).loss);"
        "import tiny_trained.runtime.serve.offline as o;"
        "asked = o.Asked(['KING'], 5, {'temperature': 0.8}, seed=1);"
        "(one,) = o.generate_run(t.Model, Path('.'), asked, False, lambda index, text: None);"
        "print(one.completion_tokens)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=moved, capture_output=True, text=True, check=True
    )
    loss, sampled = done.stdout.split()
    expected = [line["held_out"]["loss"] for line in lines(whole) if "held_out" in line][-1]
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert sampled == "5"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(
    package: Any,
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: signal.Signals,
) -> None:
    """Ctrl-C in the third step: it is finished and saved, which is told."""
    trainer = part(package, "trainer").Trainer
    step = trainer.step

    def interrupted(self: Any) -> Any:
        if self.position.steps == 2:
            os.kill(os.getpid(), stop)
        return step(self)

    out = tmp_path / "run"
    monkeypatch.setattr(trainer, "step", interrupted)
    assert train(package, out, "--data", text) == 128 + stop
    monkeypatch.undo()
    place = out / "checkpoints" / "step-00000003"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped by {stop.name} after step 3; saved {place}, from which the same command resumes"
    )
    assert [line["step"] for line in lines(out)] == [1, 2, 3]
    assert train(package, out) == 0
    assert "stopped by" not in capsys.readouterr().err
    assert content(out) == content(whole)
    ours = [line | {"seconds": 0} for line in lines(out) if "main" in line]
    theirs = [line | {"seconds": 0} for line in lines(whole) if "main" in line]
    assert ours == theirs
    assert train(package, out) == 0  # there is nothing left to do


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(package: Any, text: Path, tmp_path: Path) -> None:
    """kill -9 three times, at moments of chance while steps are made and checkpoints written.

    What it is compared with runs on as many threads: sums depend on their number.
    """
    out, whole, chance = tmp_path / "run", tmp_path / "whole", random.Random(0)
    assert started(package, whole, text).wait() == 0
    for _ in range(3):
        before = set(out.glob("checkpoints/step-*"))
        process = started(package, out, text)
        begin = time.monotonic()
        while process.poll() is None and set(out.glob("checkpoints/step-*")) <= before:
            assert time.monotonic() - begin < 120
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.wait()
    assert len(lines(out)) < STEPS
    assert started(package, out, text).wait() == 0
    assert content(out) == content(whole)
    assert not list(out.glob("checkpoints/.*"))


def started(package: Any, out: Path, text: Path) -> subprocess.Popen[bytes]:
    """The run as a process of its own, which saves at every step."""
    command = [sys.executable, "-m", "tiny_trained.train", "--out", str(out), "--data", str(text)]
    folder = str(Path(package.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--save-every", "1"], env=environment, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing", "added"])
@pytest.mark.parametrize("file", ["model/model-00001-of-00001.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_one_error_that_names_the_one_before(
    package: Any,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    file: str,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    path = out / "checkpoints" / "step-00000006" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if kind == "missing":
        path.unlink()
    elif kind == "added":
        path.with_name("more.safetensors").write_bytes(b"")
    else:
        path.write_bytes(data if kind == "flipped" else data[:-1])
    assert train(package, out) == 1
    error = capsys.readouterr().err
    assert "step-00000006 is damaged" in error
    assert "step-00000004, which is intact" in error
    shutil.rmtree(path.parents[1] if "/" in file else path.parent)
    assert train(package, out) == 0
    assert content(out) == content(whole)


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(
    package: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file may be larger than 10 KB: as on a full disk, writing stops in the middle of one."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert train(package, out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "cannot write the checkpoint" in error and "File too large" in error
    assert "earlier checkpoints are intact" in error
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000004"]
    assert train(package, out) == 0
    assert content(out) == content(whole)


@pytest.fixture
def other_builds() -> Iterator[None]:
    """Builds of the same name as the module's, which are forgotten afterwards."""
    before = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "tiny_trained"}
    yield
    forget()
    sys.modules.update(before)


def forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "tiny_trained"]:
        del sys.modules[name]


def test_what_may_change_is_told_and_what_may_not_is_refused(
    other_builds: None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    forget()
    slower = built(tmp_path / "a", "tiny_trained", train__learning_rate="1e-3", train__steps="7")
    assert train(slower, out) == 0
    error = capsys.readouterr().err
    assert "changed: train.learning_rate: Schedule(phases=(Phase(value=0.003" in error
    assert "changed: train.steps: 6 -> 7, from the next step" in error
    assert next(line for line in lines(out) if line["step"] == 7)["learning_rate"] == 1e-3
    forget()
    wider = built(tmp_path / "b", "tiny_trained", params__hidden_size="64", train__steps="7")
    assert train(wider, out) == 1
    error = capsys.readouterr().err
    assert "cannot change" in error and "params.hidden_size: 32 -> 64" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text to train on"),
        (["--data", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--data", "TEXT", "--tokenizer", "nowhere.json"], "cannot read the tokenizer"),
        (["--data", "TEXT", "--held-out", "0.999"], "need a text of 32"),
    ],
)
def test_a_run_that_cannot_begin(
    package: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    words = [str(text) if word == "TEXT" else word for word in arguments]
    assert train(package, tmp_path / "run", *words) == 1
    assert message in capsys.readouterr().err
    # What that left is in nobody's way.
    assert train(package, tmp_path / "run", "--data", text) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert train(package, tmp_path / "other", "--data", text) == 1
    assert "is not empty and not a run" in capsys.readouterr().err


def test_a_run_that_cannot_be_written(
    package: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert train(package, tmp_path / "file" / "run", "--data", text) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Not a directory" in error


def test_no_two_processes_train_a_run(
    package: Any, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with part(package, "interrupt").run_lock(whole):
        assert train(package, whole) == 1
    assert f"another process is training {whole}" in capsys.readouterr().err
    assert train(package, whole) == 0


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    """What was there before stays, and what began."""
    (tmp_path / "old").mkdir()
    for name, there in {"new": False, "old": True, "begun": True}.items():
        run = tmp_path / name
        with pytest.raises(KeyboardInterrupt), run_lock(run):
            (run / "data").mkdir()
            if name == "begun":
                (run / "run.json").touch()
            raise KeyboardInterrupt
        assert run.exists() == there


def test_a_run_goes_on_with_the_options_it_began_with(
    package: Any, whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(package, out, "--data", text, "--held-out", "0.2", "--seed", "4") == 0
    assert train(package, out) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["held_out"], record["seed"]) == (0.2, 4)
    capsys.readouterr()
    assert train(package, whole, "--seed", "3") == 1
    assert "was started with --seed 0, not 3" in capsys.readouterr().err
    assert train(package, whole, "--data", text.with_name("other.txt")) == 1
    assert "was started with --data" in capsys.readouterr().err


def test_a_spec_that_does_not_say_how_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"params.num_experts_per_tok": "2"}
    package = built(tmp_path, "tiny_endless", only=changes)
    assert train(package, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "train.batch is missing" in error
    assert "train.steps or train.tokens is missing" in error
    assert "train.sequence_length is missing" in error


def test_a_run_whose_documents_are_filled_in_the_middle(text: Path, tmp_path: Path) -> None:
    fim = "{rate: 1, begin: 400, hole: 401, end: 402}"
    package = built(tmp_path, "tiny_fim", train__fim=fim)
    assert train(package, tmp_path / "run", "--data", text, "--held-out", "0") == 0
    tokens = torch.cat([p.to(torch.int64) for p in Tokens(tmp_path / "run" / "data").parts])
    # One document and its end: three tokens more, and one.
    assert len(tokens) == 3000 + 3 + 1
    assert [t for t in tokens.tolist() if t > 255] == [400, 401, 402]
    assert not any("held_out" in line for line in lines(tmp_path / "run"))


def test_no_checkpoint_holds_a_pickle(whole: Path) -> None:
    files = {path.suffix for path in (whole / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
