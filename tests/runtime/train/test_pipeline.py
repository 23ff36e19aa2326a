"""Several pipeline and data ranks, each a process, train what one process trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import backends.build
import backends.torch.config
from tests.support.places import TEXT
from tests.support.processes import Processes, processes
from tests.support.trained import SETTINGS, built, lines, part, published

BASE = {
    **SETTINGS,
    "architecture.layers.1.repeat": "3",
    "train.batch": "8",
    "train.micro_batch": "1",
    "train.steps": "3",
    # Else Adam makes whole steps of gradients that are nothing but rounding.
    "train.optimizer.eps": "1e-3",
}
"""Four layers and one module of MTP: 8 sequences a step, of which each micro-batch has one."""


def parallel(pipeline: int, schedule: str, zero: int = 1, expert: int = 1) -> dict[str, str]:
    section = f"cluster: cpu_2x2, pipeline: {pipeline}, expert: {expert}, schedule: {schedule}"
    return {
        "parallel": f"{{{section}, zero: {zero}, batch: 8, sequence_length: 16, micro_batch: 1}}"
    }


SYMMETRIC = "exchange: symmetric_memory"


def package(folder: Path, name: str, **changes: str) -> Any:
    return built(folder, name, only={**BASE, **changes})


def words(out: Path) -> list[str]:
    """The options of a run on the shipped text."""
    data = out.with_name("text.txt")
    data.write_bytes(TEXT.read_bytes()[:3000])
    return ["--out", str(out), "--data", str(data)]


Train = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Processes]:
    """Processes that stay."""
    with processes(4) as found:
        yield found


@pytest.fixture(scope="module")
def train(ranks: Processes) -> Train:
    """`train(package, ranks, out)`: the same to its end."""

    def run(package: Any, count: int, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return ranks.train(package, count, *words(out), *more)

    return run


def tensors(out: Path, step: int = 3) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of a checkpoint, from whatever files they are in."""
    found: dict[str, torch.Tensor] = {}
    for file in (out / "checkpoints" / f"step-{step:08d}").rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert f"{file.parent.name}/{name}" not in found, "written twice"
            found[f"{file.parent.name}/{name}"] = tensor
    return found


def check_same(ours: Path, theirs: Path, exact: bool = False) -> None:
    for mine, other in zip(lines(ours), lines(theirs), strict=True):
        for name in ("total", "main", "mtp", "balance", "gradient_norm"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-5), name
        assert mine.get("experts") == other.get("experts")
        if "held_out" in other:
            assert mine["held_out"]["loss"] == pytest.approx(other["held_out"]["loss"], rel=1e-5)
            assert mine["held_out"]["mtp"] == pytest.approx(other["held_out"]["mtp"], rel=1e-5)
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if exact:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    outcome = train(package(folder, "tiny_alone"), 1, folder / "run")
    assert outcome.returncode == 0, outcome.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "expert", "schedule"),
    [
        (2, 1, "1f1b"),
        (4, 1, "zero_bubble"),
        (2, 1, "dualpipe"),
        (2, 1, "dualpipe_v"),
        (1, 2, "1f1b"),
        (1, 4, "1f1b"),
        (2, 2, "dualpipe"),
    ],
)
def test_ranks_train_what_one_process_does(
    pipeline: int, expert: int, schedule: str, alone: Path, tmp_path: Path, train: Train
) -> None:
    """2 pipeline ranks times 2 data ranks, or 4 pipeline ranks; with MTP, whose embedding and head
    lie on the first and the last stage, and with balance losses on all stages."""
    name = f"tiny_{pipeline}_{expert}_{schedule}"
    made = package(tmp_path, name, **parallel(pipeline, schedule, expert=expert))
    traced = (pipeline, expert, schedule) == (2, 2, "dualpipe")
    outcome = train(made, 4, tmp_path / "run", *(["--profile", "1"] if traced else []))
    assert outcome.returncode == 0, outcome.stderr
    assert "on cpu, 4 ranks" in outcome.stderr
    check_same(tmp_path / "run", alone)
    for line in lines(tmp_path / "run")[:3]:
        found = line["performance"]
        assert 0 < found["waited_least"] <= found["waited_most"] < line["seconds"]
        assert found["tokens_per_second"] == pytest.approx(8 * 16 / line["seconds"], rel=0.05)
        assert 10**8 < found["memory_bytes"] < 10**10
    assert (tmp_path / "run" / "profile").exists() == traced
    if traced:
        check_traces(tmp_path / "run" / "profile", pipeline, made)


PAIR = "cluster: pair\nabout: Two nodes of one process\nnodes: 2\ngpus_per_node: 1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "pipeline", "expert", "schedule", "policy"),
    [
        (2, 2, 1, "dualpipe", "fp32"),
        (2, 1, 2, "1f1b", "fp8_blockwise"),
        (4, 1, 4, "1f1b", "fp8_blockwise"),
        (4, 2, 2, "dualpipe", "bf16"),
    ],
)
def test_ranks_send_the_bytes_of_the_plan(
    count: int, pipeline: int, expert: int, schedule: str, policy: str, tmp_path: Path,
    ranks: Processes,
) -> None:  # fmt: skip
    """For each purpose, where tokens are dealt evenly to experts, as plans have it; between two
    nodes, inside one, and both."""
    layout = parallel(pipeline, schedule, expert=expert)
    if count == 2:
        (tmp_path / "pair.yaml").write_text(PAIR)
        text = layout["parallel"].replace("cpu_2x2", str(tmp_path / "pair.yaml"))
        layout = {"parallel": text}
    name = f"tiny_sent_{pipeline}_{expert}"
    changes = {"precision.policy": policy, "architecture.mtp": "{depth: 0}"}
    made = package(tmp_path, name, **changes, **layout)
    plan = json.loads(Path(made.__file__).with_name("plan.json").read_text())
    for rank, found in enumerate(ranks.call(made, count, "tests.support.sent:sent")):
        planned = {
            one["purpose"]: one["inside"]["bytes"] + one["across"]["bytes"]
            for one in plan["ranks"][rank * pipeline // count]["sent"]
        }
        assert found.pop("sums") > 0
        assert found == planned, rank


@pytest.mark.slow
def test_pairs_that_take_turns_have_the_bits_of_chunks_in_order(
    tmp_path: Path, ranks: Processes
) -> None:
    """A step with stand-ins for streams, on 2 x 2 ranks, in FP8: nothing is read before it is
    there, and of exchanges the host waits for those that count tokens before they go."""
    changes = {"precision.policy": "fp8_blockwise", "architecture.mtp": "{depth: 0}"}
    made = package(tmp_path, "tiny_turns", **changes, **parallel(2, "dualpipe", expert=2))
    layers, batches = 3, 4
    for rank, found in enumerate(ranks.call(made, 4, "tests.support.races:raced")):
        assert found["same"] and found["races"] == [], rank
        # Of 2 stages, each of which computes 2 of 4 micro-batches on this rank.
        assert found["host waits"].count("dispatch") == layers * batches // 2
        assert {"dispatch_again", "combine"}.isdisjoint(found["host waits"])
        assert min(found["clock"].values()) > 20
        # Products that are gradients of weights wait.
        assert found["chunks I"] > 0 and found["pairs"] > 0


@pytest.mark.slow
def test_ranks_exchange_by_symmetric_memory(tmp_path: Path, ranks: Processes) -> None:
    """A stand-in for torch's operator: the step of all-to-alls, bit for bit, on each rank."""
    layout = parallel(2, "dualpipe", expert=2)["parallel"].replace("}", f", {SYMMETRIC}}}")
    made = package(tmp_path, "tiny_symmetric", parallel=layout)
    layers, batches = 4, 4
    for found in ranks.call(made, 4, "tests.support.symmetric:trained"):
        assert found["same"]
        # Of each layer and micro-batch, half of which are on this rank: there and back, twice.
        assert found["calls"] == 1 + 4 * layers * batches // 2


def rows(made: Any) -> list[str]:
    """What each pipeline rank does, of the only schedule."""
    (schedule,) = (Path(made.__file__).parent / "graph").glob("schedule-*.json")
    return [" ".join(row) for row in json.loads(schedule.read_text())["rows"]]


def check_traces(folder: Path, pipeline: int, made: Any) -> None:
    """One of each pipeline rank, of one step, with its chunks and messages by name."""
    assert len(list(folder.iterdir())) == pipeline
    for rank, row in enumerate(rows(made)):
        trace = json.loads((folder / f"rank-{rank * 4 // pipeline}.json").read_text())
        names = [str(event.get("name")) for event in trace["traceEvents"]]
        kinds = re.findall(r"[FBIW](?=\d)", row)
        assert sum(name.startswith("chunk ") for name in names) == len(kinds)
        transfers = re.findall(r"send|receive", row)
        for way in ("send", "receive"):
            assert sum(name.startswith(f"{way} ") for name in names) == transfers.count(way)


@pytest.mark.slow
def test_a_batch_that_grows(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 4, 6 and 8 sequences on 4 pipeline ranks under DualPipe, which has no order of its
    own for less than 8; and the same where no schedule is longer than 4, so that steps are executed
    by 1 or 2, the second step by one of 4 and one of 2."""
    ramp = {"train.batch": "[{until_step: 2, start: 4, value: 8}, {value: 8}]"}
    one = tmp_path / "one"
    assert train(package(tmp_path, "tiny_ramp_1", **ramp), 1, one).returncode == 0
    layout = {**ramp, **parallel(4, "dualpipe")}
    whole = package(tmp_path, "tiny_ramp_4", **layout)
    for module in (backends.build, backends.torch.config):
        monkeypatch.setattr(module, "longest", lambda pipeline: 4)
    for made in (whole, package(tmp_path, "tiny_ramp_rounds", **layout)):
        out = tmp_path / f"run_of_{made.__name__}"
        outcome = train(made, 4, out)
        assert outcome.returncode == 0, outcome.stderr
        assert "rounded to those that can be dealt: 4, 6, 8 sequences" in outcome.stderr
        assert [line["batch"] for line in lines(out)[:3]] == [4, 6, 8]
        check_same(out, one)
    graphs = Path(made.__file__).parent / "graph"
    names = {path.name for path in graphs.glob("schedule-*")}
    assert names == {"schedule-2.json", "schedule-4.json"}


@pytest.mark.slow
def test_pipeline_ranks_have_the_bits_of_one(tmp_path: Path, train: Train) -> None:
    """Without MTP no weight lies on two stages, and without clipping no sum crosses stages."""
    changes = {"architecture.mtp": "{depth: 0}", "train.optimizer.clip": "1000", "train.ema": "0.9"}
    one, four = tmp_path / "one", tmp_path / "four"
    assert train(package(tmp_path, "tiny_bits_1", **changes), 1, one).returncode == 0
    built_for_4 = package(tmp_path, "tiny_bits_4", **changes, **parallel(4, "1f1b"))
    assert train(built_for_4, 4, four).returncode == 0
    check_same(four, one, exact=True)


@pytest.mark.slow
def test_sharded_optimizer_state_has_the_bits_of_whole_state(tmp_path: Path, train: Train) -> None:
    """In bfloat16 with masters and an average; each rank then has its share of both."""
    changes = {"precision.policy": "bf16", "train.ema": "0.9"}
    runs = []
    for zero in (0, 1):
        layout = parallel(2, "1f1b", zero)
        made = package(tmp_path, f"tiny_zero_{zero}", **changes, **layout)
        runs.append(tmp_path / f"run_{zero}")
        outcome = train(made, 4, runs[-1])
        assert outcome.returncode == 0, outcome.stderr
    check_same(runs[1], runs[0], exact=True)
    again = train(made, 4, runs[-1])  # reads all of it back
    assert "training is complete" in again.stderr


@pytest.mark.slow
def test_each_rank_has_an_equal_slice_of_the_state(tmp_path: Path) -> None:
    """Slices begin and end within matrices; every element is in one, updates go to the model."""
    made = package(tmp_path, "tiny_shares")
    optimizer = part(made, "optimizer")
    fake_ranks = import_module(f"{made.__name__}.runtime.train.dryrun").fake_ranks
    model = made.Model()
    before = {one.name: one.tensor.clone() for one in published(made, model)}
    found: dict[str, list[tuple[int, int]]] = {}
    for rank in range(4):
        with fake_ranks(rank, 4) as world:
            groups = {name: world for name, _ in model.named_parameters()}
            one = optimizer.AdamW(model, made.config.train.optimizer, groups, sharded=True)
            (bucket,) = one.buckets
            assert bucket.each % 64 == 0 and 0 <= 4 * bucket.each - total(model) < 4 * 64
            for published_part, shard in one.kept(model):
                if shard is not None:
                    found.setdefault(published_part.name, []).append((shard.start, shard.stop))
                    # Of float32 they are the weights themselves.
                    shard.master += 1
    whole = {one.name: one.tensor for one in published(made, model)}
    for name, ranges in found.items():
        ends = [0, *(stop for _, stop in ranges)]
        assert [start for start, _ in ranges] == ends[:-1] and ends[-1] == whole[name].numel()
        assert torch.equal(whole[name], before[name] + 1), name
    assert found.keys() == {name for name in whole if "bias" not in name}
    assert any(len(ranges) > 1 for ranges in found.values())


def total(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", [1, 2])
def test_data_ranks_have_the_bits_of_sums_in_their_order(
    pipeline: int, tmp_path: Path, train: Train
) -> None:
    """Each rank's gradients by itself, added up rank by rank, and one update of whole weights: what
    four or two data ranks that share the work have to the last bit."""
    changes = {
        "precision.policy": "bf16", "architecture.mtp": "{depth: 0}", "train.ema": "0.9",
        "train.optimizer.clip": "1000",
    }  # fmt: skip
    ranks = 4 // pipeline
    made = package(tmp_path, f"tiny_sums_{pipeline}", **changes, **parallel(pipeline, "1f1b"))
    outcome = train(made, 4, tmp_path / "run")
    assert outcome.returncode == 0, outcome.stderr
    one = trainer_of(made, tmp_path / "run")
    for _ in range(3):
        sums: list[torch.Tensor] = []
        for one.rank in range(ranks):
            one.ranks = ranks
            one._gradients(8, 0)
            found = [weight.gradient for weight in one.optimizer.weights]
            sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
            one.optimizer.drop_gradients()
        for weight, gradient in zip(one.optimizer.weights, sums, strict=True):
            weight.gradient = gradient
        settings, steps = one.settings, one.position.steps
        rate = settings.learning_rate.value_at(one.tokens + 8 * 16, steps + 1)
        one.optimizer.step(steps + 1, rate, one.optimizer.squares())
        one.balance.finish(settings.bias_update.value_at(one.tokens, steps))
        one.average.update()
        one.position = part(made, "trainer").Position(steps + 1, one.position.sequences + 8)
    expected = part(made, "state").training_state(one).tensors
    written = tensors(tmp_path / "run")
    assert len(written) == sum(map(len, expected.values()))
    for folder, group in expected.items():
        for name, tensor in group.items():
            assert torch.equal(written[f"{folder}/{name}"], tensor), name


def trainer_of(made: Any, run: Path) -> Any:
    """A trainer of one process, with the model and the sequences of a run before its first step."""
    settings = part(made, "settings").Settings.of(made.config)
    tokens = part(made, "tokens").Tokens(run / "data")
    trained, _ = part(made, "sequences").split(tokens.parts, 0.1)
    sequences = part(made, "sequences").Sequences(trained, settings.sequence_length, 0)
    return part(made, "trainer").Trainer(made.Model(seed=0), settings, sequences)


@pytest.mark.slow
def test_fp8_masks_averages_and_weights_that_are_given(tmp_path: Path, train: Train) -> None:
    """All at once, in bfloat16 with FP8 products: the bits of one process on four ranks."""
    changes = {
        "precision.policy": "fp8_blockwise",
        "architecture.mtp": "{depth: 0}",
        "train.document_mask": "true",
        "sequence.eos_token_id": "32",
        "train.optimizer.clip": "1000",
        "train.ema": "0.9",
    }
    made = package(tmp_path, "tiny_all_1", **changes)
    made.Model(seed=5).save(tmp_path / "given")
    one, four, more = tmp_path / "one", tmp_path / "four", ["--weights", str(tmp_path / "given")]
    assert train(made, 1, one, *more).returncode == 0
    outcome = train(
        package(tmp_path, "tiny_all_4", **changes, **parallel(4, "1f1b")), 4, four, *more
    )
    assert outcome.returncode == 0, outcome.stderr
    check_same(four, one, exact=True)


@pytest.mark.slow
def test_experts_on_several_ranks_in_fp8(tmp_path: Path, train: Train) -> None:
    """Tokens travel as E4M3 with their scales. What comes back of them is summed in bfloat16, rank
    by rank, hence the tolerance."""
    changes = {"precision.policy": "fp8_blockwise"}
    one, four = tmp_path / "one", tmp_path / "four"
    assert train(package(tmp_path, "tiny_fp8_1", **changes), 1, one).returncode == 0
    cut = package(tmp_path, "tiny_fp8_4", **changes, **parallel(2, "dualpipe", expert=2))
    assert "fp8.permute_quantized_local" in Path(cut.__file__).with_name("stages.py").read_text()
    outcome = train(cut, 4, four)
    assert outcome.returncode == 0, outcome.stderr
    for mine, other in zip(lines(four)[:3], lines(one)[:3], strict=True):
        assert mine["total"] == pytest.approx(other["total"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-2)


@pytest.mark.slow
def test_ranks_start_again_say_who_hangs_and_go_on(tmp_path: Path, train: Train) -> None:
    """One of four is killed in the middle of a run, and torchrun starts all again from the last
    checkpoint; then one is stopped, and the others say so and end. At last all go on."""
    made = package(tmp_path, "tiny_killed", **{"train.steps": "20"}, **parallel(2, "dualpipe_v"))
    out, errors = tmp_path / "run", tmp_path / "errors.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "4", "--max-restarts", "1", "-m", "tiny_killed.train",
               *words(out), "--save-every", "1", "--patience", "6"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with errors.open("w") as file:
        above = subprocess.Popen(command, env=environment, stderr=file)

    def after_a_checkpoint(number: int) -> int:
        """The process of the third rank, once another checkpoint is there."""
        wait_for(lambda: len(list(out.glob("checkpoints/step-*/manifest.json"))) >= number)
        children = Path(f"/proc/{above.pid}/task/{above.pid}/children").read_text().split()
        return int(children[2])

    try:
        os.kill(after_a_checkpoint(1), signal.SIGKILL)
        wait_for(lambda: errors.read_text().count("resuming from") == 1)
        done = lines(out)[-1]["step"]
        wait_for(lambda: lines(out)[-1]["step"] > done)
        stopped = after_a_checkpoint(1)
        # Ranks that the killed one left waiting may have said so of it.
        told = errors.read_text().count("does not answer")
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: errors.read_text().count("does not answer") > told)
        os.kill(stopped, signal.SIGCONT)
        assert above.wait(60) != 0
    finally:
        above.kill()
    line = re.findall(r"error: rank .*", errors.read_text())[-1]
    assert re.fullmatch(
        r"error: rank 2 on \S+ does not answer, and rank [013] on \S+ waits for it, the first for "
        r"\d+ s: (receive|send) \d+, (activations|gradients) of micro-batch \d for stage \d|"
        r".*: (the (sums|norm) of (gradients|losses)|new weights|the loads of experts|"
        r"the start of a step)",
        line,
    )
    assert lines(out)[-1]["step"] != 20
    assert train(made, 4, out).returncode == 0
    assert [line["step"] for line in lines(out) if "main" in line] == list(range(1, 21))


def wait_for(there: Callable[[], bool], patience: float = 100) -> None:
    deadline = time.monotonic() + patience
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_what_is_not_finite_is_found_on_all_ranks(tmp_path: Path, train: Train) -> None:
    """The second step's gradients overflow: ranks look for what did together, and all end."""
    changes = {"train.learning_rate": "1e30", **parallel(2, "1f1b", expert=2)}
    outcome = train(package(tmp_path, "tiny_infinite", **changes), 4, tmp_path / "run")
    assert outcome.returncode != 0
    assert re.search(
        r"step 2: .*; first not finite is the gradients of model\.embed_tokens", outcome.stderr
    )
    assert list(tensors(tmp_path / "run", step=1))


@pytest.mark.slow
def test_a_run_goes_on_under_another_layout(alone: Path, tmp_path: Path, train: Train) -> None:
    """A step on 2 x 2 ranks, one on 4 pipeline ranks and one in one process, as if all in one."""
    out = tmp_path / "run"
    for steps, ranks, layout in (
        (1, 4, parallel(2, "dualpipe", expert=2)), (2, 4, parallel(4, "1f1b")), (3, 1, {}),
    ):  # fmt: skip
        folder = tmp_path / str(steps)
        folder.mkdir()
        sys.modules.pop("tiny_moves", None)
        moved = package(folder, "tiny_moves", **layout, **{"train.steps": str(steps)})
        outcome = train(moved, ranks, out)
        assert outcome.returncode == 0, outcome.stderr
    found, expected = tensors(out), tensors(alone)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (parallel(2, "1f1b"), 1, "for 4 ranks (2 pipeline x 2 replicas x 1 expert), and 1 started"),
        (parallel(2, "1f1b"), 2, "use torchrun with 4 processes"),
        (
            {"parallel": parallel(2, "1f1b")["parallel"].replace("}", ", exchange: deep_ep}")},
            4, "`parallel.exchange` is deep_ep, and there is no module deep_ep here: install",
        ),
        (
            {"parallel": parallel(2, "1f1b")["parallel"].replace("}", f", {SYMMETRIC}}}")},
            4, "`parallel.exchange` is symmetric_memory, and torch finds no NVSHMEM here: install",
        ),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_trained_is_refused(
    changes: dict[str, str], ranks: int, message: str, tmp_path: Path
) -> None:
    """Never silently in another way."""
    made = package(tmp_path, f"tiny_{tmp_path.name}", **changes)
    with pytest.raises(part(made, "settings").TrainError, match=re.escape(message)):
        part(made, "parallel").check_parallel(made.config, ranks)


def test_every_module_is_on_some_stage_and_only_those_of_a_stage_are_held(tmp_path: Path) -> None:
    made = package(tmp_path, "tiny_held", **parallel(4, "1f1b"))
    whole = {one.name for one in published(made, made.Model(device="meta"))}
    plans = part(made, "parallel").stages_of(made.Model).STAGES
    share = sys.modules[f"{made.__name__}.runtime.stage"].ModelShare
    held = [
        {one.name for one in published(made, made.Model(device="meta", share=share(plan.holds)))}
        for plan in plans
    ]
    assert set().union(*held) == whole
    both = {"model.embed_tokens.weight"}
    assert {
        name for i, one in enumerate(held) for other in held[:i] for name in one & other
    } == both


@pytest.mark.slow
def test_a_weight_on_two_stages_whose_gradients_are_not_added_is_noticed(
    alone: Path, tmp_path: Path, train: Train
) -> None:
    made = package(tmp_path, "tiny_faulty", **parallel(2, "1f1b"))
    place = Path(made.__file__).parent / "runtime/train/parallel.py"
    text = place.read_text()
    faulty = text.replace(
        "mesh.groups[one] for name", "mesh.groups.get(Holders(frozenset([mesh.pipeline]))) for name"
    )
    assert faulty != text
    place.write_text(faulty)
    assert train(made, 4, tmp_path / "run").returncode == 0
    with pytest.raises(AssertionError):
        check_same(tmp_path / "run", alone)


FAULTS = {
    "nothing": ("parallel.py", "", ""),
    "a mirror is not summed": (
        "parallel.py", "mesh.groups[one] for", "mesh.groups.get(Holders(frozenset())) for",
    ),
    "a replica counts twice": ("buckets.py", "in found[1:]", "in found"),
    "experts count twice": ("parallel.py", "self.mesh.experts / batch", "4 / batch"),
}  # fmt: skip
"""Changes of a file of the package's `runtime/train`."""


@pytest.mark.slow
def test_wrong_sums_over_ranks_are_noticed(alone: Path, tmp_path: Path, train: Train) -> None:
    """By the loss or the norm of gradients of the first step, on 2 pipeline x 2 expert ranks."""
    layout = parallel(2, "dualpipe", expert=2)
    made = package(tmp_path, "tiny_faults", **layout, **{"train.steps": "1"})
    expected, noticed = lines(alone)[0], {}
    for name, (file, right, wrong) in FAULTS.items():
        place = Path(made.__file__).parent / "runtime" / "train" / file
        text = place.read_text()
        assert right in text
        place.write_text(text.replace(right, wrong) if right else text)
        out = tmp_path / name
        assert train(made, 4, out).returncode == 0
        place.write_text(text)
        found = lines(out)[0]
        noticed[name] = any(
            found[key] != pytest.approx(expected[key], rel=1e-5)
            for key in ("total", "gradient_norm")
        )
    assert noticed == {name: name != "nothing" for name in FAULTS}
