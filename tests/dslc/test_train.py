"""`dslc tokenizer`, `train`, `eval` and `generate`: the way from a spec to a text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.command import Run
from tests.support.places import ROOT, TINY

SETS = [
    "params.hidden_size=32",
    "architecture.layers.1.repeat=1",
    "train.sequence_length=32",
    "train.batch=4",
    "train.learning_rate=3e-3",
    "train.steps=3",
    "train.ema=0.5",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes((ROOT / "data/tinyshakespeare.txt").read_bytes()[:4000])
    return folder / "run"


def train(run: Path, *more: str) -> list[str]:
    sets = [word for one in SETS for word in ("--set", one)]
    return ["train", "deepseek_v3_tiny", *sets, "--out", str(run), *more]


@pytest.mark.slow
def test_a_spec_is_trained_measured_and_continues_a_text(dslc: Run, run: Path) -> None:
    outcome = dslc(*train(run, "--data", str(run.parent / "text.txt")))
    assert outcome.status == 0, outcome.err
    assert re.search(r"step 1 .* loss \d\.\d+ .* tokens/s", outcome.err)

    outcome = dslc("eval", str(run))
    assert outcome.status == 0, outcome.err
    assert "MTP depth 2" in outcome.out
    told = json.loads(dslc("eval", str(run), "--format", "json").out)
    assert f"{told['loss']:.4f} nats per token" in outcome.out
    averaged = json.loads(dslc("eval", str(run), "--ema", "--format", "json").out)
    assert averaged["loss"] != told["loss"]

    words = ("generate", str(run), "--prompt", "ROMEO:", "--tokens", "20")
    outcome = dslc(*words)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("ROMEO:")
    assert dslc(*words).out == outcome.out
    assert dslc(*words, "--seed", "1").out != outcome.out


@pytest.mark.slow
def test_a_run_says_what_it_was_started_with(dslc: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes((ROOT / "data/tinyshakespeare.txt").read_bytes()[:4000])
    spec = tmp_path / "study.yaml"
    values = "".join(f"  {one.replace('=', ': ')}\n" for one in SETS)
    variants = "variants:\n  short: {train.steps: 1}\n  slow: {train.learning_rate: 1e-3}\n"
    spec.write_text(f"extends: {TINY}\nmodel: varied\nset:\n{values}{variants}")
    words = ["train", str(spec), "--out", "run", "--variant", "short", "--variant", "slow"]
    outcome = dslc(*words, "--set", "train.ema=0.9", "--data", str(text))
    assert outcome.status == 0, outcome.err
    record = json.loads(Path("run/run.json").read_text())
    assert record["variants"] == ["short", "slow"] and record["set"] == ["train.ema=0.9"]
    assert record["spec"] == str(spec)
    # Another spec of the same run, which goes on.
    assert (
        dslc(
            "train", str(spec), "--out", "run", "--variant", "slow", "--set", "train.steps=2"
        ).status
        == 0
    )
    assert json.loads(Path("run/run.json").read_text())["variants"] == ["slow"]


@pytest.mark.slow
def test_what_cannot_be_is_one_error(dslc: Run, run: Path, tmp_path: Path) -> None:
    assert dslc(*train(run, "--data", str(run.parent / "text.txt"))).status == 0
    for words, message in [
        (["eval", str(tmp_path)], "is not a dslc run directory"),
        (["generate", str(run), "--tokens", "1000"], "exceed the longest text (256)"),
        (["generate", str(run), "--prompt", ""], "at least one token"),
        (train(run, "--seed", "1"), "was started with --seed 0"),
        (["train", "deepseek_v3_tiny", "--out", str(tmp_path / "x")], "train.batch is missing"),
    ]:
        outcome = dslc(*words)
        assert outcome.status == 1
        assert message in outcome.err
        assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_learned_tokenizer_serves_a_run(dslc: Run, run: Path, tmp_path: Path) -> None:
    text, tokens = run.parent / "text.txt", tmp_path / "tokens"
    words = ["tokenizer", str(text), "-o", str(tokens)]
    outcome = dslc(*words, "--vocab-size", "300", "--special", "<begin>", "--special", "<end>",
                   "--eos", "1")  # fmt: skip
    assert outcome.status == 0, outcome.err
    count = int(re.search(r"([\d,]+) tokens, vocabulary 300", outcome.out)[1].replace(",", ""))  # type: ignore[index]
    assert 1000 < count < 4000
    outcome = dslc(*train(tmp_path / "run", "--data", str(tokens)))
    assert outcome.status == 0, outcome.err
    found = json.loads(dslc("eval", str(tmp_path / "run"), "--format", "json").out)
    # A token is more than a byte: bits per byte are fewer than bits per token.
    assert found["bits_per_byte"] < 0.8 * found["loss"] / 0.6931472
    assert dslc(*words, "--tokenizer", "bytes").status == 1  # the folder exists
    outcome = dslc("tokenizer", str(text), "-o", str(tmp_path / "b"), "--tokenizer", "bytes")
    assert outcome.status == 0
    outcome = dslc(*train(tmp_path / "other", "--data", str(tmp_path / "b")))
    assert outcome.status == 1
    assert "tokenize the text again" in outcome.err
    outcome = dslc(*train(tmp_path / "other", "--data", str(text), "--data", str(tokens)))
    assert outcome.status == 1
    assert f"{tokens} holds tokens, which cannot be joined with other files" in outcome.err
