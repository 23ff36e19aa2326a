"""Runs of two ranks, each a process, as torchrun starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.places import TEXT
from tests.support.processes import PATIENCE, started
from tests.support.trained import built, content, lines, part

pytestmark = pytest.mark.slow
STEPS = 16
Process = subprocess.Popen[str]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("spread")
    (folder / "text.txt").write_bytes(TEXT.read_bytes()[:3000])
    return built(folder, "tiny_spread", train__batch="5", train__steps=str(STEPS))


@pytest.fixture(scope="module")
def whole(spread: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert ended(torchrun(spread, out)) == [0]
    return out


def words(package: Any, out: Path) -> list[str]:
    data = Path(package.__file__).parents[1] / "text.txt"
    return ["-m", "tiny_spread.train", "--out", str(out), "--data", str(data), "--save-every", "1",
            "--eval-every", "5", "--eval-sequences", "7"]  # fmt: skip


def torchrun(package: Any, out: Path) -> Process:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *ranks, *words(package, out)]
    folder = str(Path(package.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def both(package: Any, out: Path) -> list[Process]:
    """The ranks without torchrun above them, so that nothing but they themselves ends them."""
    return started(words(package, out), path=Path(package.__file__).parents[1])


def ended(*processes: Process) -> list[int]:
    """Their statuses, soon."""
    try:
        return [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()


def after_a_checkpoint(out: Path, processes: list[Process], act: Callable[[], None]) -> list[int]:
    """What becomes of the processes if, once a new checkpoint is there, `act` is done."""
    before, begin = set(out.glob("checkpoints/step-*")), time.monotonic()
    while set(out.glob("checkpoints/step-*")) <= before:
        assert time.monotonic() - begin < PATIENCE
        assert all(process.poll() is None for process in processes)
        time.sleep(0.005)
    act()
    return ended(*processes)


def newest(out: Path) -> int:
    return max(int(path.name[-8:]) for path in out.glob("checkpoints/step-*"))


def test_two_ranks_make_the_run_that_one_makes(spread: Any, whole: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    assert part(spread, "command").main(spread.Model, words(spread, alone)[2:]) == 0
    for ours, theirs in zip(lines(whole), lines(alone), strict=True):
        assert flat(ours) == pytest.approx(flat(theirs), rel=1e-4)
    assert names(whole) == names(alone)
    assert (whole / "run.json").read_text() == (alone / "run.json").read_text()
    # The weights lie in a file for each rank, which one process reads.
    found = part(spread, "command").evaluate(spread.Model, whole, False)
    assert found.loss == pytest.approx(lines(whole)[-1]["held_out"]["loss"], rel=1e-5)


def flat(line: dict[str, Any]) -> dict[str, float]:
    """All numbers of a line but those of time."""
    found: dict[str, float] = {}
    for name, value in line.items():
        inner = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inner, dict):
            found |= {f"{name}.{key}": number for key, number in flat(inner).items()}
        elif name != "seconds":
            found[str(name)] = value
    return found


def names(run: Path) -> set[str]:
    """What a run holds. Files of tensors are called by ranks, those of TensorBoard by the time."""
    named = re.compile("safetensors|tfevents|__pycache__")
    paths = (str(path.relative_to(run)) for path in run.rglob("*"))
    return {path for path in paths if not named.search(path)}


def test_ranks_that_are_killed_or_stopped_go_on_bit_for_bit(
    spread: Any, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    ranks = both(spread, out)
    assert after_a_checkpoint(out, ranks, ranks[1].kill) == [1, -signal.SIGKILL]
    assert "another rank has failed" in ranks[0].communicate()[1]

    ranks = both(spread, out)
    stop = lambda: ranks[1].send_signal(signal.SIGTERM)  # noqa: E731
    assert after_a_checkpoint(out, ranks, stop) == [128 + signal.SIGTERM] * 2
    assert newest(out) == lines(out)[-1]["step"] < STEPS
    assert "Traceback" not in ranks[0].communicate()[1] + ranks[1].communicate()[1]

    assert ended(*both(spread, out)) == [0, 0]
    assert content(out, STEPS) == content(whole, STEPS)
    assert not list(out.glob("checkpoints/.*"))


def test_all_ranks_leave_when_the_first_refuses(spread: Any, whole: Path) -> None:
    with part(spread, "interrupt").run_lock(whole):
        ranks = both(spread, whole)
        assert ended(*ranks) == [1, 1]
    first, second = (rank.communicate()[1] for rank in ranks)
    assert first == f"error: another process is training {whole}\n"
    assert second == ""


def test_another_number_of_ranks_is_told(
    spread: Any, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part(spread, "command").main(spread.Model, ["--out", str(whole)]) == 0
    error = capsys.readouterr().err
    assert (
        "changed: 2 ranks before, 1 now: sums have another order, results are not bit-identical"
        in error
    )
    assert json.loads((whole / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())[
        "ranks"
    ] == 2  # fmt: skip
