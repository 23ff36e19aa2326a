"""Decoding in the latent space: tiles of queries and keys, and into how many parts keys are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backends.render import render
from backends.triton.instances import DECODE_ROWS, OpInstance, OpInstances, attentions, spans
from backends.triton.kernel import Arg, Case, KernelFile, nbytes
from backends.triton.target import Target

PAGE = 64
"""Tokens of a page, as FlashMLA has them."""

CONTEXT = 4096
"""Tokens that sequences have in the cases that are looked at."""

MIN_DOT_DIM = 16
"""The narrowest operand of a matrix instruction."""

WARPGROUP = 64
"""Rows of the first operand that sm_90 multiplies at a time, by four warps together."""

SPLIT = 16
"""Pages of a split, whatever the batch. Results of splits, written and read, are 0.44 times the
bytes of the keys for V3's 128 heads; the best number is not measured."""

COMBINED = 4
"""Rows that a program joins, a warp each: 16 numbers a thread."""


@dataclass(frozen=True)
class LatentTile:
    """Rows (m, queries times heads) and keys (n) of a tile."""

    m: int
    n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LatentShape:
    """What the spec fixes of one attention to latents."""

    heads: int
    latent: int
    rope: int

    @property
    def latent_block(self) -> int:
        return max(MIN_DOT_DIM, 1 << (self.latent - 1).bit_length())

    @property
    def rope_block(self) -> int:
        return max(MIN_DOT_DIM, 1 << (self.rope - 1).bit_length())

    def case(
        self, function: str, sizes: tuple[int, int, int], instances: Sequence[OpInstance]
    ) -> Case:
        batch, queries, keys = sizes
        q = Arg((batch, queries, self.heads, self.latent))
        q_rope = Arg((batch, queries, self.heads, self.rope))
        c_kv, k_rope = (Arg((batch, keys, n)) for n in (self.latent, self.rope))
        taken: tuple[Arg, ...] = (q, q_rope, c_kv, k_rope)
        if function == "paged_latent_attention":
            pages = -(-keys // PAGE)
            table = Arg((batch, pages), "int32", "pages", batch * pages)
            lengths = Arg((batch,), "int32", "lengths", keys)
            stored = (Arg((batch * pages, PAGE, n)) for n in (self.latent, self.rope))
            taken = (q, q_rope, *stored, table, lengths)
        scale = instances[0].op.real("scale")
        dim = 2 * self.latent + self.rope
        return Case(
            name=f"{function} h{self.heads} c{self.latent} b{batch} q{queries} k{keys}",
            function=function,
            arguments=(*taken, scale),
            flops=2 * batch * queries * self.heads * keys * dim,
            bytes=nbytes(*taken, q),
            bound_by="bf16",
            spans=spans(instances),
        )


def kernel_file(instances: OpInstances, target: Target) -> KernelFile | None:
    """`kernels/latent_attention.py`, for the sizes that occur."""
    found = attentions(instances, "latent_attention")
    if not found:
        return None
    shapes = list(
        dict.fromkeys(
            LatentShape(instance.size(0, 2), instance.size(0), instance.size(1))
            for instance in found
        )
    )
    keys_first = all(_keys_first(shape, target) for shape in shapes)
    text = render(
        "triton/latent_attention.py.jinja",
        spans=", ".join(spans(found)),
        shapes=[(shape, _tile(shape, target, keys_first)) for shape in shapes],
        page=PAGE,
        split=SPLIT,
        target=target,
        combined=COMBINED,
        keys_first=keys_first,
        halves=target.name == "sm_90" and not keys_first,
        row="[None, :]" if keys_first else "[:, None]",
        axis=0 if keys_first else 1,
    )
    serves = {f"F.{name}": "bfloat16" for name in ("latent_attention", "paged_latent_attention")}
    cases = (case for shape in shapes for case in _cases(shape, found))
    return KernelFile("latent_attention", text, serves, tuple(cases))


def _keys_first(shape: LatentShape, target: Target) -> bool:
    """Few heads on sm_90: keys and latents take the place of the 64 rows that it wants, and no row
    is empty. The queries of several heads are 16 columns."""
    return target.name == "sm_90" and shape.heads <= MIN_DOT_DIM and shape.latent_block >= WARPGROUP


def _tile(shape: LatentShape, target: Target, keys_first: bool) -> LatentTile:
    """All of a tile's output stays where it is summed: m times 512 numbers."""
    if keys_first:
        return LatentTile(MIN_DOT_DIM, PAGE, 8, 2)
    if target.backend == "hip":
        # Operands of products are in registers, too: 512 of each thread of 4 warps hold 32 rows.
        few = shape.heads <= MIN_DOT_DIM
        return LatentTile(MIN_DOT_DIM, 32, 4, 1) if few else LatentTile(32, 16, 4, 1)
    # Two warpgroups hold 64 rows of 512 at 128 registers a thread: no other tile has no spills.
    # Each of them computes the scores of half of the keys: 36 HGMMA of 64 x 32 and 4 of 64 x 256 a
    # turn; where Triton gives all scores to both, 72 and 4, 1.5 times the arithmetic.
    # In tensor memory the rows take all of its 512 columns, and scores the room of rows that are
    # not used. What sm_100 reads ahead leaves shared memory for 32 keys.
    return LatentTile(WARPGROUP, PAGE if target.name == "sm_90" else 32, 8, 2)


def _cases(shape: LatentShape, instances: Sequence[OpInstance]) -> Iterator[Case]:
    """A token of each sequence; two, as when a draft is verified; short sequences; pages."""
    sizes = [*((batch, 1, CONTEXT) for batch in DECODE_ROWS), (DECODE_ROWS[-1], 2, CONTEXT)]
    for size in (*sizes, (3, 1, 100)):
        yield shape.case("latent_attention", size, instances)
    for size in (sizes[0], sizes[-2], (3, 1, 100)):
        yield shape.case("paged_latent_attention", size, instances)
