"""Tokens to the experts of other ranks and back, in processes with gloo, against one process.

All numbers are small whole ones in float64, so that sums are exact in any order.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import tests.support.deep_ep as deep_ep
from runtime import deepep, exchange, fp8, symmetric
from tests.support.symmetric import stand_in

WORLD, EXPERTS, K, WIDTH = 4, 8, 3, 4
TOKENS, HIDDEN = 6, 128


@dataclass(frozen=True)
class Case:
    """A routing: `experts` are those that may be chosen, `tokens` how many each rank has."""

    experts: tuple[int, ...]
    tokens: tuple[int, ...] = (TOKENS,) * WORLD
    k: int = K


CASES = {
    "even": Case(tuple(range(EXPERTS))),
    "skewed": Case((0, 1, 2, 3, 7)),
    "all to one expert": Case((5,), k=1),
    "all to one rank": Case((6, 7), k=2),
    "ranks without arrivals": Case((0, 1, 7)),
    "a rank without tokens": Case(tuple(range(EXPERTS)), (0, 6, 2, 4)),
    "no tokens at all": Case(tuple(range(EXPERTS)), (0,) * WORLD),
}
SIZES = (2, 4)
KINDS = (*SIZES, "nodes")
"""Among 2 ranks, among 4, and among 2 nodes of 2."""


def tokens_of(case: Case, rank: int) -> dict[str, Tensor]:
    """What a rank has: x and the gradient of y [1, tokens, width], weights and experts [.., k]."""
    generator = torch.manual_seed(100 * list(CASES.values()).index(case) + rank)
    count, chosen = case.tokens[rank], torch.tensor(case.experts)
    order = torch.rand(1, count, len(chosen), generator=generator).argsort(-1)[..., : case.k]
    whole = {"x": WIDTH, "d_y": WIDTH, "weight": case.k}
    found = {
        name: torch.randint(-4, 5, (1, count, width), generator=generator).double()
        for name, width in whole.items()
    }
    return {**found, "experts": chosen[order]}


def matrices() -> Tensor:
    """One for each expert: y is the sum over a token's experts of weight * x @ matrix."""
    generator = torch.manual_seed(7)
    return torch.randint(-3, 4, (EXPERTS, WIDTH, WIDTH), generator=generator).double()


def computed(x: Tensor, weight: Tensor, experts: Tensor, d_y: Tensor | None, first: int) -> Any:
    """y of the rows, or with `d_y` the gradients of x and weight; experts of -1 are elsewhere."""
    there = (experts >= 0).double()
    every = matrices()[experts.clamp(min=0) + first]
    each = torch.einsum("nd,nkde->nke", x, every)
    if d_y is None:
        return torch.einsum("nk,nke->ne", weight * there, each)
    d_x = torch.einsum("nk,nkde,ne->nd", weight * there, every, d_y)
    return d_x, torch.einsum("nke,ne->nk", each, d_y) * there


Kind = exchange.Exchange | exchange.NodeExchange


def exchanged(one: Kind, given: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """A layer of experts, forward and backward, as generated code calls it."""
    x_8 = given["x"].to(torch.float8_e4m3fn)
    x, x_8, weight, experts, handle = one.dispatch(
        given["x"], x_8, given["weight"], given["experts"]
    )
    assert isinstance(x, Tensor) and isinstance(x_8, Tensor) and isinstance(weight, Tensor)
    assert isinstance(experts, Tensor) and not isinstance(handle, Tensor)
    assert torch.equal(x_8.double(), x), "rows of FP8 arrive as they were sent"
    y = one.combine(computed(x, weight, experts, None, first), handle)
    d_y = one.dispatch_again(given["d_y"], handle)
    assert isinstance(y, Tensor) and isinstance(d_y, Tensor)
    d_x, d_weight = one.combine(*computed(x, weight, experts, d_y, first), handle)
    found = {"y": y, "d_x": d_x, "d_weight": d_weight}
    hops = (handle,) if isinstance(handle, exchange.Handle) else (handle.across, handle.inside)
    for name in ("sent", "arrived"):
        found[name] = torch.tensor([getattr(hop, name) for hop in hops])
    return found


def same_bits(one: Any, group: dist.ProcessGroup, given: dict[str, Tensor]) -> bool:
    """Whether a layer that sends tokens by `one` has the bits of one that does by all-to-alls; in
    FP8, where gradients of results are in FP8 or bfloat16."""
    x = given["x"].repeat(1, 1, HIDDEN // WIDTH).bfloat16() / 3
    weight = given["weight"].float() / 7
    packed, ways = fp8.quantize(x, "ue8m0"), []
    for kind in (exchange.Exchange(group, EXPERTS), one):
        *rows, there, experts, handle = kind.dispatch(*packed, weight, given["experts"])
        found: list[Any] = [*rows, there, experts, kind.dispatch_again(x, handle)]
        found += kind.dispatch_again(*packed, handle)
        y = fp8.dequantize(rows[0], rows[1], dtype=torch.bfloat16)
        found += [kind.combine(y, handle), *kind.combine(y, there, handle)]
        ways.append(found)
    return all(
        mine.dtype == other.dtype and torch.equal(mine, other)
        for mine, other in zip(*ways, strict=True)
    )


SPLITS = ((5, 3, 0, 1), (7, 2, 0, 4))
"""Rows of two ranks for two experts on each of them."""


def by_expert(memory: Any, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Rows for several experts of a rank, which are numbered by rank and expert."""
    device, splits = torch.device("cpu"), torch.tensor(SPLITS[group.rank()])
    given = memory.empty(16, 1, dtype=torch.int64, device=device)
    out, counts, arrived = (
        memory.empty(*size, dtype=torch.int64, device=device) for size in ((40, 1), (4,), (2, 4))
    )
    for one in (given, out, counts, arrived):
        memory.rendezvous(one, group)
    numbers = torch.arange(4) + 100 * group.rank()
    given[: int(splits.sum()), 0] = numbers.repeat_interleave(splits)
    counts.copy_(splits)
    torch.ops.symm_mem.all_to_all_vdev_2d(given, out, counts, arrived, group.group_name, 16)
    return {"out": out, "arrived": arrived}


def work(rank: int, folder: str) -> None:
    """All cases in one process, among 2 ranks and among 4."""
    sys.modules["deep_ep"] = deep_ep  # type: ignore[assignment]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
    places = [dist.new_group([place, place + 2]) for place in range(2)]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    kinds: dict[int | str, tuple[Kind, int]] = {}
    for size, group in groups.items():
        kinds[size] = exchange.Exchange(group, EXPERTS), rank % size * EXPERTS // size
    of_nodes = exchange.NodeExchange(places[rank % 2], pairs[rank // 2], EXPERTS)
    kinds["nodes"] = of_nodes, rank * EXPERTS // WORLD
    rows: list[int] = []
    plain = exchange.all_to_all_single

    def counted(out: Tensor, given: Tensor, *sizes: list[int], group: dist.ProcessGroup) -> None:
        plain(out, given, *sizes, group=group)
        if sizes:
            rows.append(len(given) - sizes[1][group.rank()])

    exchange.all_to_all_single = counted
    found = {}
    for kind, (one, first) in kinds.items():
        for name, case in CASES.items():
            rows.clear()
            results = exchanged(one, tokens_of(case, rank), first)
            found[kind, name] = {**results, "rows": torch.tensor(rows)}
    memory = stand_in(symmetric)
    # The widest rows are those of y in bfloat16, with gradients of weights in float32.
    most, width = WORLD * TOKENS, 2 * HIDDEN + 4 * K
    shared = symmetric.SymmetricBuffers(groups[4], groups[4], torch.device("cpu"), most, width)
    others = {
        "deep_ep": deepep.DeepEPExchange(deepep.deep_ep_buffer, groups[4], EXPERTS, TOKENS),
        "symmetric": symmetric.SymmetricExchange(shared, EXPERTS),
    }
    for name, case in CASES.items():
        for kind, one in others.items():
            same = same_bits(one, groups[4], tokens_of(case, rank))
            found[kind, name] = {"same": torch.tensor(same)}
    found["symmetric", "calls"] = {"calls": torch.tensor(memory.calls)}
    found["symmetric", "rows by expert"] = by_expert(memory, groups[2])
    # One for each number of experts of a token: layers alike have the same memory.
    found["deep_ep", "made"] = {"buffers": torch.tensor(deep_ep.ElasticBuffer.made)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


Found = list[dict[tuple[int | str, str], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank has of each case: one start of four processes for all of them."""
    folder = tmp_path_factory.mktemp("exchange")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_does(name: str, kind: int | str, found: Found) -> None:
    """Forward and backward, to the last bit."""
    for rank in range(WORLD):
        given = {key: value.flatten(0, 1) for key, value in tokens_of(CASES[name], rank).items()}
        x, weight, experts, d_y = (given[key] for key in ("x", "weight", "experts", "d_y"))
        y = computed(x, weight, experts, None, 0)
        d_x, d_weight = computed(x, weight, experts, d_y, 0)
        for key, expected in (("y", y), ("d_x", d_x), ("d_weight", d_weight)):
            got = found[rank][kind, name][key]
            assert got.shape == (1, len(x), expected.shape[-1])
            assert torch.equal(got[0], expected), f"{key} on rank {rank}"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_a_token_is_sent_once_to_each_rank_that_has_its_experts(
    name: str, size: int, found: Found
) -> None:
    sent = torch.zeros(WORLD, WORLD, dtype=torch.int64)
    for rank in range(WORLD):
        for experts in tokens_of(CASES[name], rank)["experts"].flatten(0, 1).tolist():
            for to in {expert * size // EXPERTS for expert in experts}:
                sent[rank, rank // size * size + to] += 1
    for rank in range(WORLD):
        results, first = found[rank][size, name], rank // size * size
        assert torch.equal(results["sent"][0], sent[rank, first : first + size])
        assert torch.equal(results["arrived"][0], sent[first : first + size, rank])
        out = int(sent[rank].sum() - sent[rank, rank])
        back = int(sent[:, rank].sum() - sent[rank, rank])
        # x, x in FP8, weights and experts; y back; its gradient; back those of x and of weights.
        assert results["rows"].tolist() == [out, back, out, back]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_token_is_sent_once_to_each_node_that_has_its_experts(name: str, found: Found) -> None:
    """To the rank with the same place, and from there once to each rank of its experts."""
    across = torch.zeros(WORLD, 2, dtype=torch.int64)
    inside = torch.zeros(WORLD, 2, dtype=torch.int64)
    for rank in range(WORLD):
        for experts in tokens_of(CASES[name], rank)["experts"].flatten(0, 1).tolist():
            ranks = {expert * WORLD // EXPERTS for expert in experts}
            for node in {to // 2 for to in ranks}:
                across[rank, node] += 1
            for to in ranks:
                inside[to // 2 * 2 + rank % 2, to % 2] += 1
    for rank in range(WORLD):
        results, node, place = found[rank]["nodes", name], rank // 2, rank % 2
        assert torch.equal(results["sent"], torch.stack([across[rank], inside[rank]]))
        arrived = [across[[place, place + 2], node], inside[[2 * node, 2 * node + 1], place]]
        assert torch.equal(results["arrived"], torch.stack(arrived))
        out, on = int(across[rank, 1 - node]), int(inside[rank, 1 - place])
        home, back = int(across[(rank + 2) % 4, node]), int(inside[rank ^ 1, place])
        assert results["rows"].tolist() == [out, on, back, home] * 2


@pytest.mark.slow
def test_deep_ep_moves_the_same_rows(found: Found) -> None:
    """A stand-in with its interface, which checks what it is given."""
    for rank in found:
        assert all(rank["deep_ep", name]["same"] for name in CASES)
        assert rank["deep_ep", "made"]["buffers"] == len({case.k for case in CASES.values()})


@pytest.mark.slow
def test_symmetric_memory_moves_the_same_rows(found: Found) -> None:
    """A stand-in for torch's operator, with rows for the most that can arrive and no more."""
    for rank in found:
        assert all(rank["symmetric", name]["same"] for name in CASES)
        assert rank["symmetric", "calls"]["calls"] == 1 + 5 * len(CASES)


@pytest.mark.slow
def test_the_stand_in_lays_rows_out_as_torch_documents(found: Found) -> None:
    """The example of `all_to_all_vdev_2d`: c0 has 5 rows, d0 has 7, and c1 begins at 16."""
    for rank in range(WORLD):
        got, first = found[rank]["symmetric", "rows by expert"], rank % 2 * 2
        splits = [SPLITS[other][first + expert] for expert in range(2) for other in range(2)]
        rows = [100 * other + first + expert for expert in range(2) for other in range(2)]
        assert got["arrived"][0].tolist() == splits
        expected = [0, splits[0], 16, 16 + splits[2]]
        assert got["arrived"][1].tolist() == expected
        for start, count, row in zip(expected, splits, rows, strict=True):
            assert got["out"][start : start + count].tolist() == [[row]] * count


def test_the_cases_are_what_they_are_called() -> None:
    """Otherwise the tests above would show less than they say."""
    loads = {
        name: torch.stack([
            torch.bincount(tokens_of(case, rank)["experts"].flatten(), minlength=EXPERTS)
            for rank in range(WORLD)
        ]).sum(0).tolist()
        for name, case in CASES.items()
    }  # fmt: skip
    assert min(loads["even"]) > 0
    assert loads["skewed"][4:7] == [0, 0, 0] and loads["skewed"][7] > 0
    assert loads["all to one expert"] == [24 * (expert == 5) for expert in range(EXPERTS)]
    assert sum(loads["all to one rank"][:6]) == 0
    assert sum(loads["ranks without arrivals"][2:6]) == 0
    assert sum(loads["no tokens at all"]) == 0
