"""Bytes that operators move between ranks, against a count by hand."""

from __future__ import annotations

from compiler.graph.types import parse_type
from compiler.ops import OPS
from compiler.ops.base import CommBytes, Site
from compiler.ops.comm import Dispatch

# DeepSeek-V3 as published: 256 experts on 64 ranks of 8 nodes, 8 of them for a token, on at most 4.
V3 = {"count": 256, "ranks": 64, "nodes": 8, "limit": 4}
TOKENS = {"batch": 1, "seq": 4096}
ROUTE = "i64[batch@expert, seq, k=8]"


def site(*types: str, **attrs: object) -> Site:
    return Site(tuple(map(parse_type, types)), attrs=attrs)  # type: ignore[arg-type]


def test_a_token_of_v3_costs_7392_bytes_a_node_to_dispatch_and_14336_to_combine() -> None:
    """Report, section 3.2.2; FP8 rows with a float32 scale for each 128, BF16 back."""
    # The element type of FP8 is one byte, as bool is.
    rows = ["bool[batch@expert, seq, hidden_size=7168]", "f32[batch@expert, seq, tiles=56]"]
    there = site(*rows, ROUTE.replace("i64", "f32"), ROUTE, **V3)
    assert Dispatch.token_bytes(there) == 7392
    routing = 8 * (4 + 8)
    assert Dispatch.moved(there, TOKENS) == CommBytes(4096 * 8 * (7392 + routing),
                                                  4096 * 4 * (7392 + routing))  # fmt: skip
    back = site("bf16[arrived@expert, hidden_size=7168]", "i64[arrived@expert]", ROUTE, **V3)
    assert OPS["combine"].moved(back, TOKENS) == CommBytes(4096 * 8 * 14336, 4096 * 4 * 14336)
    again = site("bf16[batch, seq, hidden_size=7168]", "i64[arrived@expert]", **V3, k=8)
    assert OPS["dispatch_again"].moved(again, TOKENS) == OPS["combine"].moved(back, TOKENS)


def test_the_rank_at_which_a_token_arrives_need_not_pass_it_on() -> None:
    """2 nodes of 2 ranks: at most one other node, and on each node one other rank."""
    there = site("f32[batch, h=2]", "i64[batch, k=4]", count=8, ranks=4, nodes=2, limit=2)
    assert OPS["dispatch"].moved(there, {"batch": 10}) == CommBytes(10 * 2 * 40, 10 * 1 * 40)
    one_node = site("f32[batch, h=2]", "i64[batch, k=4]", count=8, ranks=4, nodes=1, limit=1)
    assert OPS["dispatch"].moved(one_node, {"batch": 10}) == CommBytes(10 * 3 * 40, 0)
    one_a_node = site("f32[batch, h=2]", "i64[batch, k=1]", count=8, ranks=4, nodes=4, limit=2)
    assert OPS["dispatch"].moved(one_a_node, {"batch": 10}) == CommBytes(0, 10 * 16)


def test_balanced_experts_get_as_many_slots_as_their_rank_has_tokens_times_k() -> None:
    there = site("f32[batch, seq, h=2]", ROUTE.replace("@expert", ""), **V3)
    sizes = OPS["dispatch"].sizes(there, TOKENS)
    assert sizes == {"slot": 4096 * 8, "arrived": 4096 * 8}
    permuted = site("f32[arrived, h=2]", "i64[arrived, k=8]", count=("n", 4))
    assert OPS["permute"].sizes(permuted, sizes) == {"slot": 4096 * 8}


def test_a_share_goes_round_inside_and_then_between_nodes() -> None:
    """16 ranks on 2 nodes, 1600 bytes: 7/8 of them inside, and 1/2 of an eighth across."""
    group = {"axes": ("expert",), "ranks": 16, "nodes": 2}
    x = "f32[a=400] partial(expert)"
    assert OPS["reduce_scatter"].moved(site(x, **group), {}) == CommBytes(1400, 100)
    assert OPS["all_reduce"].moved(site(x, **group), {}) == CommBytes(2800, 200)
    gathered = site("f32[shard=25@expert]", **group, into=("a", 400))
    assert OPS["all_gather"].moved(gathered, {}) == CommBytes(1400, 100)


def test_pipeline_stages_are_on_different_nodes() -> None:
    x = site("bf16[batch@expert, seq, hidden_size=7168]", stage=1)
    assert OPS["send"].moved(x, TOKENS) == CommBytes(0, 4096 * 14336)
    assert OPS["recv"].moved(site(pipeline=0, type="f32[]"), TOKENS) == CommBytes()
