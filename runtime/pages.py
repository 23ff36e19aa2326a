"""The paged KV cache: what a decoder remembers of many sequences, in blocks that tables list.

A step computes tokens of several sequences at once, packed into a batch of one. No row's bits
depend on the other rows: scores, sums and products have one order in any batch, so that a request
always gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .functional import Mask, among, best_keys, capped, visible, wide

NUMBERS = 2**22
"""About so many elements of temporaries are in memory at once in attention; at least a row's."""

FEW = 5
"""Rows of a sequence that attend like rows of as many sequences: those of drafts."""


PagedAttention = Callable[..., Tensor]
Draft = Callable[[Tensor, Tensor, Tensor, "Pages"], Tensor]
"""Logits [scored, vocab] by an MTP module, of states, the tokens after them, positions, cache."""


@dataclass(frozen=True)
class Group:
    """Neighbouring rows that attend together: each by its own table, or all by the same."""

    rows: slice
    table: Tensor
    """int64 [rows or 1, blocks]: the blocks of each sequence; block 0 fills up."""


@dataclass(frozen=True)
class Rows:
    """What a step computes: `n` tokens of several sequences."""

    slots: Tensor
    """int64 [n]: the place of each token in the cache, its block times the page plus its place
    within."""
    lengths: Tensor
    """int64 [n]: how many keys each row sees, itself included."""
    groups: tuple[Group, ...]
    """Cover all rows in order."""
    scored: Tensor
    """int64 [scored]: the rows whose next token is asked for."""

    @property
    def apart(self) -> bool:
        """Whether each row attends by its own table."""
        return all(len(g.table) == g.rows.stop - g.rows.start for g in self.groups)


class Pages:
    """The cache of up to `blocks - 1` blocks of `page` tokens, for every module that appends to it.

    Block 0 belongs to no sequence: tables are padded with it. Memory is allocated when a module
    first appends, with the dtype and device of the entry. `begin` comes before each step.
    """

    rows: Rows
    states: Tensor
    """The states [1, n, hidden] that the last step handed to the head, of all its rows."""
    broken: Tensor
    """bool [n]: rows of the last step that had a NaN or an infinite value to cache."""

    def __init__(
        self, blocks: int, page: int, paged_latent_attention: PagedAttention | None = None
    ) -> None:
        """With `paged_latent_attention`, of the arguments of that in `functional`, rows attend to
        latents by it."""
        self.blocks = blocks
        self.page = page
        self._latent = paged_latent_attention
        self._pools: dict[tuple[nn.Module, str], Tensor] = {}

    def begin(self, rows: Rows) -> None:
        """A step of these rows."""
        self.rows = rows
        self.broken = torch.zeros_like(rows.slots, dtype=torch.bool)

    def append(self, module: nn.Module, **entries: Tensor) -> tuple[Tensor, ...]:
        """Writes entries [1, n, ...] to the slots of the rows; all of the cache [blocks, page, ...]
        each, without gradients."""
        return tuple(self._append((module, name), entry) for name, entry in entries.items())

    def pool(
        self,
        module: nn.Module,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """The cache [blocks, page, ...] of an entry of a module, of that shape for each token."""
        pool = self._pools.get((module, name))
        if pool is None:
            pool = torch.zeros(self.blocks, self.page, *shape, dtype=dtype, device=device)
            self._pools[module, name] = pool
        return pool

    def _append(self, key: tuple[nn.Module, str], entry: Tensor) -> Tensor:
        pool = self.pool(*key, entry.shape[2:], entry.dtype, entry.device)
        # The weight of what a row does not see is 0, and 0 times NaN is NaN: the cache never holds
        # any, so that a broken request harms no other.
        new = entry[0].detach()
        finite = new.isfinite()
        self.broken |= ~finite.flatten(1).all(1)
        pool.flatten(0, 1)[self.rows.slots] = new.where(finite, 0)
        return pool

    def attend(self, attention: Callable[..., Tensor], *operands: Tensor, **numbers: Any) -> Tensor:
        """`F.attention` or another function of `ATTENTIONS` of the rows, each to its own
        sequence."""
        kernel = self._latent if numbers.keys() == {"scale"} else None
        if kernel is not None and attention.__name__ == "latent_attention":
            return _by_table(kernel, self.rows, *operands, **numbers)
        return ATTENTIONS[attention.__name__](self.rows, *operands, **numbers)

    def each(
        self, function: Callable[..., Any], remembered: tuple[int, ...], *operands: Tensor
    ) -> Any:
        """`function` of the tokens of each sequence, one sequence after the other: `remembered`,
        operands by number, are what `append` returned; the others [1, n, ..] are of the rows."""
        found = []
        for rows, table in self._sequences():
            length = int(self.rows.lengths[rows.stop - 1])
            given = [
                x[table].flatten(0, 1)[:length].unsqueeze(0) if i in remembered else x[:, rows]
                for i, x in enumerate(operands)
            ]
            found.append(function(*given))
        if isinstance(found[0], Tensor):
            return torch.cat(found, 1)
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))

    def _sequences(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of one sequence, and its blocks: many new tokens, or one by itself."""
        for group in self.rows.groups:
            if len(group.table) == 1:
                yield group.rows, group.table[0]
            else:
                for i, table in enumerate(group.table, group.rows.start):
                    yield slice(i, i + 1), table

    def last(self, x: Tensor) -> Tensor:
        """Of states x [1, n, hidden] those of the scored rows: [scored, hidden]."""
        self.states = x
        return x[0, self.rows.scored]

    def read(self, block: int) -> Tensor:
        """A copy of what all modules remember in a block, on the CPU: uint8 [bytes of a block]."""
        parts = [pool[block].contiguous().view(torch.uint8) for pool in self._pools.values()]
        return torch.cat([part.flatten().cpu() for part in parts])

    def check(self, data: Tensor) -> None:
        """Raises ValueError for data of a block that has another size than those here."""
        own = sum(pool[0].nbytes for pool in self._pools.values())
        if data.numel() != own:
            raise ValueError(
                f"a block here has {own} bytes, one of {data.numel()} came: both engines need the "
                "same model, page and drafts"
            )

    @torch.inference_mode()  # as pools are made in
    def write(self, block: int, data: Tensor) -> None:
        """What `read` gave of a block of another cache, by the same modules. Raises ValueError for
        data of another size."""
        self.check(data)
        sizes = [pool[block].nbytes for pool in self._pools.values()]
        for pool, part in zip(self._pools.values(), data.split(sizes), strict=True):
            # A copy, for where a part begins may not be a multiple of its elements' size.
            pool[block] = part.clone().view(pool.dtype).view(pool.shape[1:])

    @property
    def bytes(self) -> int:
        """Memory allocated so far, in bytes."""
        return sum(pool.nbytes for pool in self._pools.values())


@dataclass(frozen=True)
class Scores:
    """How products of queries and keys become scores; `F.attention` says what each is."""

    scale: float
    window: int | None = None
    mask: Mask | None = None
    softcap: float | None = None
    selected: Tensor | None = None
    sinks: Tensor | None = None


def attention(rows: Rows, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """q [1, n, heads, dim], k [blocks, page, kv_heads, dim], v [blocks, page, kv_heads, v_dim]:
    [1, n, heads, v_dim]."""
    q = q[0].unflatten(1, (k.shape[2], -1))

    def keys(table: Tensor) -> tuple[Tensor, ...]:
        # In one layout, whether rows share them or not: sums follow it.
        return tuple(wide(x[table]).transpose(2, 3).contiguous() for x in (k, v))

    return _attend(rows, q, keys, (v.shape[1], v.shape[3]), Scores(**how))


def latent_attention(
    rows: Rows, q_latent: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, **how: Any
) -> Tensor:
    """q_latent [1, n, heads, c], q_rope [1, n, heads, r], c_kv [blocks, page, c], k_rope [blocks,
    page, r]: [1, n, heads, c]."""
    q = torch.cat([q_latent, q_rope], -1)[0].unsqueeze(1)

    def keys(table: Tensor) -> tuple[Tensor, Tensor]:
        k = wide(torch.cat([c_kv[table], k_rope[table]], -1)).unsqueeze(2)
        return k, k[..., : c_kv.shape[-1]]

    return _attend(rows, q, keys, (c_kv.shape[1], c_kv.shape[2]), Scores(**how))


def lightning_indexer(rows: Rows, q: Tensor, k: Tensor, weight: Tensor, topk: int) -> Tensor:
    """q [1, n, heads, d], k [blocks, page, d], weight [1, n, heads]: int64 [1, n, topk], places in
    the sequence of each row. As in attention, no row's scores depend on the other rows."""
    (heads, _), page = q.shape[2:], k.shape[1]
    parts = []
    for group in rows.groups:
        start, stop = group.rows.start, group.rows.stop
        shared, blocks = len(group.table) == 1, group.table.shape[1]
        step = max(NUMBERS // (blocks * page * (heads + (0 if shared else k.shape[2]))), 1)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            table = group.table if shared else group.table[first - start : last - start]
            keys = wide(k[table]).transpose(2, 3).contiguous().unsqueeze(2)
            queries = wide(q[0, first:last])[:, None, None].expand(-1, blocks, 1, -1, -1)
            score = torch.relu(_blockwise(queries, keys)[:, :, 0])  # [n, blocks, heads, page]
            score = score * wide(weight[0, first:last])[:, None, :, None]
            total = _in_order(score.transpose(1, 2)).flatten(1)
            place = torch.arange(blocks * page, device=q.device)
            later = place >= rows.lengths[first:last, None]
            parts.append(best_keys(total.masked_fill(later, -math.inf), topk))
    return torch.cat(parts).unsqueeze(0)


def _by_table(attention: PagedAttention, rows: Rows, *operands: Tensor, scale: float) -> Tensor:
    """Like `latent_attention`, by a function that takes sequences of one number of queries."""
    q_latent, q_rope, c_kv, k_rope = operands
    parts = []
    for group in rows.groups:
        lengths = rows.lengths[group.rows]
        if len(group.table) < len(lengths):  # rows of one sequence
            q = (x[:, group.rows] for x in (q_latent, q_rope))
            lengths = lengths[-1:]
        else:
            q = (x[0, group.rows].unsqueeze(1) for x in (q_latent, q_rope))
        found = attention(*q, c_kv, k_rope, group.table.int(), lengths.int(), scale)
        parts.append(found.flatten(0, 1))
    return torch.cat(parts).unsqueeze(0)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": attention,
    "latent_attention": latent_attention,
    "lightning_indexer": lightning_indexer,
}

Keys = Callable[[Tensor], tuple[Tensor, ...]]
"""Of a table [s, blocks] the keys and values [s, blocks, kv_heads, page, ..]."""


def _attend(rows: Rows, q: Tensor, keys: Keys, values: tuple[int, int], how: Scores) -> Tensor:
    """q [n, kv_heads, heads of each, dim], `values` are page and v_dim: [1, n, heads, v_dim]."""
    kv_heads, heads, dim = q.shape[1:]
    page, width = values
    parts = []
    for group in rows.groups:
        start, stop = group.rows.start, group.rows.stop
        shared, blocks = len(group.table) == 1, group.table.shape[1]
        # Of a row: scores or a result for each block, and its keys and values if they are its own.
        elements = kv_heads * blocks * heads * max(page, width)
        elements += 0 if shared else kv_heads * blocks * page * (dim + width)
        step = max(NUMBERS // elements, 1)
        found = keys(group.table) if shared else ()
        for first in range(start, stop, step):
            last = min(first + step, stop)
            k, v = found or keys(group.table[first - start : last - start])
            own = how
            if how.selected is not None:
                own = replace(how, selected=how.selected[0, first:last])
            parts.append(_softmax(wide(q[first:last]), k, v, rows.lengths[first:last], own))
    return torch.cat(parts).to(q.dtype).flatten(1, 2).unsqueeze(0)


def _softmax(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, how: Scores) -> Tensor:
    """Softmax attention of each row to as many keys as `lengths` says, block by block in order.

    q [n, kv_heads, g, dim], k [n or 1, blocks, kv_heads, page, dim], v likewise: [n, kv_heads, g,
    v_dim]. Every product is of the same shape for any number of rows and blocks, every sum
    over blocks runs from the first to the last, and blocks that a row does not see add zeros: its
    bits depend on its own sequence alone.
    """
    blocks, page = k.shape[1], k.shape[3]
    product = _blockwise(q.unsqueeze(1).expand(-1, blocks, *q.shape[1:]), k.transpose(3, 4))
    score = capped(product * how.scale, how.softcap)
    place = torch.arange(blocks * page, device=q.device).view(blocks, 1, 1, page)
    seen = visible(lengths.view(-1, 1, 1, 1, 1) - 1, place, how.window, how.mask)
    if how.selected is not None:
        seen = seen & among(how.selected, blocks * page).view(-1, blocks, 1, 1, page)
    score.masked_fill_(~seen, -math.inf)
    most = score.amax((1, 4), keepdim=True)
    if how.sinks is not None:
        sink = how.sinks.to(score.dtype).view(1, 1, *score.shape[2:4], 1)
        most = most.maximum(sink)
    score = score.sub_(most).exp_()
    total = _in_order(score.sum(-1, keepdim=True))
    if how.sinks is not None:
        total = total + (sink - most).exp().squeeze(1)
    return _in_order(_blockwise(score, v)) / total


def _blockwise(a: Tensor, b: Tensor) -> Tensor:
    """Products of a [n, blocks, kv_heads, i, j] and b [n or 1, blocks, kv_heads, j, k]."""
    n, blocks, heads = a.shape[:3]
    if len(b) == n:
        # `flatten` of b must be a view: a copy in another layout would be summed in another order.
        out = torch.bmm(a.reshape(-1, *a.shape[3:]), b.view(-1, *b.shape[3:]))
        return out.view(n, blocks, heads, *out.shape[1:])
    # One sequence for all rows: its keys are not copied for each of them.
    out = a.new_empty(n, blocks, heads, a.shape[3], b.shape[4])
    for block in range(blocks):
        for head in range(heads):
            shared = b[0, block, head].expand(n, -1, -1)
            out[:, block, head] = torch.bmm(a[:, block, head], shared)
    return out


def _in_order(x: Tensor) -> Tensor:
    """The sum over blocks of x [n, blocks, ...], from the first to the last: [n, ...]."""
    total = x[:, 0]
    for block in range(1, x.shape[1]):
        total = total + x[:, block]
    return total


def make_rows(
    sequences: Sequence[tuple[Sequence[int], int, int]],
    scored: Sequence[int],
    page: int,
    device: torch.device | str = "cpu",
) -> tuple[Rows, Tensor]:
    """The rows of a step, and their positions int64 [1, n].

    A sequence is its blocks, the position of its first new token, and how many are new; it has
    blocks for all of them. `scored` are indices of rows. Sequences of few new tokens that have
    about the same length, packed, attend together.
    """
    slots: list[int] = []
    position: list[int] = []
    tables: list[tuple[int, list[int]]] = []  # rows, blocks that they see
    for blocks, first, new in sequences:
        places = range(first, first + new)
        position += places
        slots += [blocks[i // page] * page + i % page for i in places]
        if new <= FEW:
            tables += ((1, list(blocks[: i // page + 1])) for i in places)
        else:
            tables.append((new, list(blocks[: (first + new - 1) // page + 1])))
    return Rows(
        torch.tensor(slots, device=device),
        torch.tensor(position, device=device) + 1,
        tuple(_groups(tables, device)),
        torch.tensor(scored, dtype=torch.int64, device=device),
    ), torch.tensor([position], device=device)


def _groups(tables: Sequence[tuple[int, list[int]]], device: torch.device | str) -> list[Group]:
    groups: list[Group] = []
    start = 0
    waiting: list[list[int]] = []

    def close() -> None:
        nonlocal start
        if waiting:
            most = max(map(len, waiting))
            table = [[*blocks, *[0] * (most - len(blocks))] for blocks in waiting]
            rows = slice(start, start + len(waiting))
            groups.append(Group(rows, torch.tensor(table, device=device)))
            start += len(waiting)
            waiting.clear()

    for new, blocks in tables:
        if new > 1 or (waiting and _size(blocks) != _size(waiting[0])):
            close()
        if new > 1:
            groups.append(Group(slice(start, start + new), torch.tensor([blocks], device=device)))
            start += new
        else:
            waiting.append(blocks)
    close()
    return groups


def _size(blocks: Sequence[int]) -> int:
    return (len(blocks) - 1).bit_length()
