"""Experts on 2 and 4 ranks over gloo: the bits of one process, other places for experts while they
serve, and what is said of a rank that ends or hangs."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from backends.build import build
from dsl.load import load
from runtime.eplb import imbalance
from tests.support.places import TINY

NAME = "deepseek_v3_tiny"
RANKS = 4
REDUNDANT = 4
EVERY = 10
REQUESTS = 18
DIES = 2
"""The rank that is killed."""


def module(name: str) -> ModuleType:
    """Of the built package."""
    return importlib.import_module(f"{NAME}.runtime.{name}")


def asked() -> list[tuple[list[int], Any]]:
    """Prompts of few and many tokens, greedy and not."""
    rng = random.Random(0)
    sampling = module("serve.request").Sampling
    found = []
    for i in range(REQUESTS):
        prompt = [rng.randrange(512) for _ in range(rng.choice([1, 3, 17, 40, 90]))]
        temperature = rng.choice([0.0, 0.7])
        found.append((prompt, sampling(rng.randrange(1, 16), temperature, seed=i, logprobs=2)))
    return found


def options(speculate: int = 0) -> Any:
    return module("serve.options").Options(
        page=8, max_requests=4, step_tokens=33, speculate=speculate
    )


def make(store: Any, rank: int, size: int, folder: Path, patience: float, **more: Any) -> Any:
    """A rank with its engine, as `serve/ranks.py` makes it."""
    spread = module("serve.spread")
    model = importlib.import_module(NAME).Model
    group = module("serve.group").Group(store, rank, size, patience)
    balancing = spread.Balancing(groups=4, **more)
    loaded = model(device="meta")
    layers = spread.spread(loaded, group, balancing)
    module("checkpoint").load(loaded, folder, whole=model(device="meta"))
    together = module("serve.lockstep").Lockstep(loaded, layers, group, 8)
    together.warm_up()
    engine = module("serve.engine").Engine(together, options(0 if size == RANKS else 2))
    rebalance = module("serve.rebalance").Rebalance(NAME, layers, group, balancing)
    return module("serve.front").RankEngine(engine, together, group, rebalance)


def serve(rank: Any) -> dict[str, list[Any]]:
    """On rank 0 the answers to all requests, which come a few at a time; elsewhere it follows."""
    front = module("serve.front")
    if rank.group.rank:
        front.follow(rank)
        return {}
    served, rng, left = front.Front(rank), random.Random(1), list(enumerate(asked()))
    found: dict[str, list[Any]] = {}
    while left or served.busy:
        for i, (prompt, sampling) in left[: rng.randrange(4)]:
            served.add(str(i), prompt, sampling)
            left.pop(0)
        for event in served.step():
            assert event.finish != "error", event.message
            found.setdefault(event.id, []).extend(event.tokens)
    for _ in range(6):  # until all layers that wait have moved
        served.step()
    assert served.stats()["running"] == 0 and served.stats()["generated_tokens"] > REQUESTS
    rank.group.broadcast(None)
    return found


def places(rank: Any) -> dict[str, tuple[list[int], list[list[int]], int]]:
    """The loads and the placement of each layer, and how many experts are here."""
    loads = rank.rebalance.loads
    return {
        layer.name: (loads[layer.name], layer.placement, len(layer.stack.ids))
        for layer in rank.model.layers
    }


def killed(rank: Any) -> str:
    """How the engines end when one of them is killed in its 6th step."""
    front, failure = module("serve.front"), module("serve.group").RankFailure
    if rank.group.rank == DIES:
        step, rank.engine.steps = rank.engine.step, 0

        def count() -> Any:
            rank.engine.steps += 1
            if rank.engine.steps == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        rank.engine.step = count
    start = time.monotonic()
    try:
        if rank.group.rank:
            front.follow(rank)
        else:
            served = front.Front(rank)
            for i, (prompt, sampling) in enumerate(asked()):
                served.add(str(i), prompt, sampling)
            while served.busy:
                served.step()
    except failure as error:
        assert time.monotonic() - start < 20
        return str(error)
    return "it went on"


def hung(rank: Any) -> str:
    """How rank 0 ends when rank 1 does not step any more."""
    if rank.group.rank:
        time.sleep(6)
        return ""
    start = time.monotonic()
    try:
        module("serve.front").Front(rank).step()
    except module("serve.group").RankFailure as error:
        assert time.monotonic() - start < 6
        return str(error)
    return "it went on"


def lossy(wires: Any) -> Any:
    """One block of 20 is lost on the way."""
    rng, send, lost = random.Random(0), wires.prompts.send, module("serve.handoff").BlockOf
    wires.prompts.send = lambda one: (
        None if isinstance(one, lost) and rng.random() < 0.05 else send(one)
    )
    return wires


def aborted(served: Any) -> Any:
    """How requests end that are aborted at once and after the first token, and who is left."""
    ends = {}
    for id in ("at once", "later"):
        served.add(id, [5] * 20, module("serve.request").Sampling(60))
    served.abort("at once")
    while served.busy:
        for event in served.step():
            ends[event.id] = event.finish
            if event.id == "later" and event.finish is None:
                served.abort("later")
    stats = served.stats()
    return ends, stats["running"], stats["waiting"]


def handed(group: Any, folder: Path) -> tuple[dict[str, list[Any]], int, Any]:
    """One rank computes prompts, the other answers."""
    handoff, divided = module("serve.handoff"), module("serve.divided")
    engine = module("serve.engine").Engine(importlib.import_module(NAME).load(folder), options(2))
    (wires,) = divided.connect(group, 60)
    found: dict[str, list[Any]] = {}
    if group.rank == 1:
        prefill = handoff.PrefillEngine(engine, lossy(wires).prompts)
        divided.follow_asks(prefill, wires)
        return found, 0, ()
    served = divided.Divided(engine, [wires], lambda: None)
    for i, request in enumerate(asked()):
        served.add(str(i), *request)
    assert served.stats()["waiting"] == REQUESTS
    while served.busy:
        for event in served.step():
            found.setdefault(event.id, []).extend(event.tokens)
    assert served.stats()["prompt_tokens"] == sum(len(prompt) for prompt, _ in asked())
    ends = aborted(served)
    served.close()
    return found, served.decode.recomputed, ends


def work(rank: int, parent: Path, ports: list[int], results: Any) -> None:
    """One process: two pairs of ranks, of which one serves; then all, until one is killed."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(parent))
    folder = parent / "weights"

    def store(port: int, master: bool, size: int) -> TCPStore:
        return TCPStore("127.0.0.1", port, size, is_master=master)

    pair, number = divmod(rank, 2)
    two = make(store(ports[pair], number == 0, 2), number, 2, folder, (20, 1)[pair])
    if pair == 0:
        results.put(("two", rank, serve(two)))
        two.group.close()
    else:
        results.put(("handed", rank, handed(two.group, folder)))
        results.put(("hung", rank, hung(two)))
        torch.distributed.destroy_process_group()
    four = make(
        store(ports[2], rank == 0, RANKS), rank, RANKS, folder, 20, redundant=REDUNDANT, every=EVERY
    )
    results.put(("four", rank, serve(four)))
    results.put(("places", rank, (places(four), four.rebalance.moved)))
    results.put(("killed", rank, killed(four)))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the package and its weights."""
    parent = tmp_path_factory.mktemp("ranks")
    build(load(TINY), parent / NAME)
    sys.path.insert(0, str(parent))
    importlib.invalidate_caches()
    for one in [one for one in sys.modules if one.split(".")[0] == NAME]:
        del sys.modules[one]
    model = importlib.import_module(NAME).Model(seed=3)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[[0, 5]] = 0.2  # two experts are chosen by almost all tokens
    model.save(parent / "weights")
    yield parent
    sys.path.remove(str(parent))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def found(package: Path) -> dict[str, dict[int, Any]]:
    """What each rank says of each part of `work`."""
    context = mp.get_context("forkserver")  # torch is imported once for all
    context.set_forkserver_preload([__name__])
    results, ports = context.Queue(), free_ports(3)
    processes = [
        context.Process(target=work, args=(rank, package, ports, results)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    said: dict[str, dict[int, Any]] = {}
    for _ in range(RANKS * 2 + 6 + RANKS - 1):
        what, rank, value = results.get(timeout=300)
        said.setdefault(what, {})[rank] = value
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL, 0]
    return said


@pytest.fixture(scope="module")
def expected(package: Path) -> dict[str, list[Any]]:
    """The answers of an engine in one process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = importlib.import_module(NAME).load(package / "weights")
    engine = module("serve.engine").Engine(model, options())
    answers = engine.generate(asked())
    torch.set_num_threads(before)
    return {str(i): answer for i, answer in enumerate(answers)}


@pytest.mark.slow
def test_two_and_four_ranks_give_the_bits_of_one_process(
    found: dict[str, dict[int, Any]], expected: dict[str, list[Any]]
) -> None:
    """Four ranks while experts move, two with drafts."""
    assert found["four"][0] == expected
    assert found["two"][0] == expected


@pytest.mark.slow
def test_prompts_and_answers_on_two_ranks_give_the_bits_of_one(
    found: dict[str, dict[int, Any]], expected: dict[str, list[Any]]
) -> None:
    answers, recomputed, aborted = found["handed"][2]
    assert answers == expected and recomputed > 0
    assert aborted == ({"at once": "abort", "later": "abort"}, 0, 0)


@pytest.mark.slow
def test_experts_move_to_where_their_load_is_even(found: dict[str, dict[int, Any]]) -> None:
    """All ranks agree on it; ranks hold no other experts than their own."""
    (first, moved), *others = (found["places"][rank] for rank in range(RANKS))
    assert moved >= 2 and all(other == (first, moved) for other in others)
    for name, (tokens, placement, held) in first.items():
        experts = len(tokens)
        assert held == (experts + REDUNDANT) // RANKS
        best = imbalance(tokens, module("eplb").place(tokens, REDUNDANT, RANKS))
        even = imbalance(tokens, module("eplb").place([1] * experts, REDUNDANT, RANKS))
        now = imbalance(tokens, placement)
        assert now <= best * module("serve.rebalance").WORTH, name
        assert now < even or not any(tokens)


@pytest.mark.slow
def test_a_rank_that_ends_or_hangs_is_named(found: dict[str, dict[int, Any]]) -> None:
    killed = found["killed"]
    # Whoever looks when rank 0 has ended already hears no more than that.
    gone = "rank 0 or its torchrun, where ranks meet, has ended or does not answer"
    assert set(killed) == {0, 1, 3} and len({*killed.values()} - {gone}) == 1
    assert killed[0] != gone
    assert f"rank {DIES} on {socket.gethostname()} does not answer" in killed[0]
    assert f"rank 1 on {socket.gethostname()} goes on computing" in found["hung"][2]
