"""`dslc serve` and `python -m MODEL.serve`: a built model behind HTTP, started and ended."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends.build import build
from dsl.expert_load import read_load
from dsl.load import load
from runtime.serve.command import end_tokens, fingerprint
from runtime.serve.options import Options
from runtime.serve.settings import Settings
from runtime.train.options import declared
from tests.support.command import Run
from tests.support.places import ROOT, TINY
from tests.support.processes import environments
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with a tokenizer and a template; beside it the package."""
    parent = tmp_path_factory.mktemp("served")
    build(load(TINY), parent / "deepseek_v3_tiny")
    program = "import deepseek_v3_tiny as m; m.Model(seed=3).save('weights')"
    subprocess.run([sys.executable, "-c", program], cwd=parent, check=True)
    folder = parent / "weights"
    (folder / "tokenizer.json").write_bytes(byte_level())
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    return folder


SPECULATING = ("deepseek_v3_tiny.serve", "--speculate", "1", "--checkpoint")


@contextmanager
def started(
    folder: Path, *command: str | Path, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server."""
    path = os.pathsep.join([str(folder), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command), "--port", "0", "--max-requests", "4"],
        cwd=folder, env={**os.environ, **environment, "PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield line.split()[3].rstrip("/"), process
    finally:
        process.kill()
        process.communicate()


def answer(url: str, **more: Any) -> Any:
    body = {"prompt": "Größe", "max_tokens": 8, "seed": 1, **more}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_folder_is_served_alike_by_both_commands(weights: Path) -> None:
    """One is ended by a signal, the other, which speculates, by the end of its engine."""
    with started(weights.parent, "dslc", "serve", weights) as (url, process):
        first = answer(url, n=2)["choices"]
        assert answer(url, n=2)["choices"] == first, "not the same again"
        assert first[0] != first[1]
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "weights"
        body = {"messages": [{"role": "user", "content": "a<|im_start|>"}]}
        ids = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
        assert ids[0] == 2 and ids.count(2) == 1, "the tokenizer and the template of the folder"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with started(weights.parent, *SPECULATING, weights) as (
        url,
        process,
    ):
        assert answer(url, n=2)["choices"] == first
        metrics = httpx.get(f"{url}/metrics").text
        drafts = re.search(r"^dslc:spec_decode_num_draft_tokens_total (.*)$", metrics, re.M)
        assert drafts and float(drafts[1]) > 0
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "deepseek_v3_tiny"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        (engine,) = [pid for pid, command in commands.items() if b"spawn_main" in command]
        os.kill(int(engine), signal.SIGKILL)
        assert process.wait(20) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefill-ranks", "1"], "--prefill-ranks 1 needs 2 ranks, of which the first answers"),
        (["--weights", "int8"], "only compiled steps read them; build deepseek_v3_tiny with"),
        (["--weights", "int4"], "weights can be fp8 or int8, not 'int4'"),
        (["--max-model-len", "100000"], "exceeds max_position_embeddings"),
        (["--chat-template", "absent.jinja"], "cannot read the chat template absent.jinja"),
        (["--tokenizer", "absent.json"], "cannot read the tokenizer absent.json"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1 port 0"),
        (["--checkpoint", "absent"], "absent holds no safetensors"),
    ],
)
def test_what_cannot_be_served_is_one_message(
    weights: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(weights.parent)
    model = importlib.import_module("deepseek_v3_tiny").Model
    command = importlib.import_module("deepseek_v3_tiny.runtime.serve.command")
    assert command.main(model, ["--checkpoint", str(weights), "--port", "0", *words]) == 1
    printed = capfd.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1, printed.err
    assert printed.err.startswith("error: ") and message in printed.err


def test_what_is_no_model(dslc: Run, tmp_path: Path) -> None:
    done = dslc("serve", tmp_path)
    assert done.status == 1 and "config.json" in done.err


def test_a_run_whose_package_cannot_serve(dslc: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": "written_before"}))
    (tmp_path / "written_before" / "runtime").mkdir(parents=True)
    for folder in ("written_before", "written_before/runtime"):
        (tmp_path / folder / "__init__.py").touch()
    done = dslc("serve", tmp_path)
    assert done.status == 1 and "older dslc" in done.err and "dslc export" in done.err


def test_every_option_says_its_default() -> None:
    listed = {one.name: one.option.help for one in declared(Settings)}
    assert list(listed) == [one.name for one in fields(Settings)]
    for one in fields(Settings):
        if isinstance(one.default, int) and not isinstance(one.default, bool):
            assert f"[{one.default}]" in listed[one.name]


class Given:
    """What is read of a model."""

    class config:  # noqa: N801
        class sequence:  # noqa: N801
            eos_token_id = 5


def test_end_tokens_are_those_of_the_folder_or_the_spec(tmp_path: Path) -> None:
    model: Any = Given
    assert end_tokens(model, tmp_path) == {5}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert end_tokens(model, tmp_path) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert end_tokens(model, tmp_path) == {8, 9}
    (tmp_path / "generation_config.json").write_text("{")
    assert end_tokens(model, tmp_path) == {7}


def test_the_fingerprint_is_that_of_weights_and_sizes(tmp_path: Path) -> None:
    model: Any = Given
    file = tmp_path / "model.safetensors"
    found = set()
    for content in (b"a" * 200_000, b"a" * 199_999 + b"b", b"b" + b"a" * 199_999, b"a"):
        file.write_bytes(content)
        found.add(fingerprint(model, tmp_path, Options()))
        assert fingerprint(model, tmp_path, Options(max_requests=3)) in found
    found.add(fingerprint(model, tmp_path, Options(page=16)))
    assert len(found) == 5


def test_two_ranks_serve_until_a_signal(weights: Path, tmp_path: Path) -> None:
    """As torchrun starts them. Loads are written when nothing is left to do. A signal to all, such
    as Ctrl-C, lets running answers end; then all ranks do, with status 0."""
    first, second = environments(2)
    loads = tmp_path / "load.json"
    words = ("dslc", "serve", weights, "--device", "cpu", "--redundant-experts", "2")
    words += ("--record-load", loads, "--rebalance", "1000")
    path = os.pathsep.join([str(weights.parent), str(ROOT)])
    other = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=weights.parent, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **second, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        with started(weights.parent, *words, **first) as (url, process):
            answers = [answer(url, seed=seed)["choices"][0]["text"] for seed in (1, 2)]
            assert answers == [answer(url, seed=seed)["choices"][0]["text"] for seed in (1, 2)]
            while not loads.exists():
                time.sleep(0.1)
            layers = read_load(loads, 16)
            used = [sum(load) > 0 for load in layers.values()]
            assert used == [True, True, False, False], "of two layers and two MTP modules"
            metrics = httpx.get(f"{url}/metrics").text
            name = r'^dslc:expert_load_max_over_mean{layer="model\.layers\.(\d)\.mlp"} (.*)$'
            found = dict(re.findall(name, metrics, re.M))
            assert {*found} >= {"1", "2"} and all(1 <= float(one) <= 2 for one in found.values())
            body = {"prompt": "a", "max_tokens": 60, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
                lines = (line for line in stream.iter_lines() if line)
                next(lines)
                for one in (process, other):
                    one.send_signal(signal.SIGINT)
                *_, last, done = lines
            assert (
                json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            )
            assert done == "data: [DONE]"
            assert [one.wait(20) for one in (process, other)] == [0, 0]
    finally:
        other.kill()
        other.communicate()


def test_experts_are_spread_over_several_ranks_only(dslc: Run, weights: Path) -> None:
    done = dslc("serve", weights, "--redundant-experts", "2")
    assert done.status == 1 and "are for several ranks: start them with torchrun" in done.err
