"""How a product of matrices is cut in tiles: the candidates of each GPU, and what each would cost.

A program computes a tile of y = x W^T: some rows of x times some columns of y. Few large tiles move
less and leave multiprocessors idle; many small ones the other way. No candidate is tried out: the
cost is that of a model, and orders candidates; it foretells no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from backends.triton.target import Target
from backends.triton.tuning_table import TuningTable

GROUP_SIZE = 128


@dataclass(frozen=True)
class GemmTile:
    """Rows of x, columns of y, and how the program is compiled.

    `hot` is how many instructions a warp executes for each 128 of what is summed over, counted in
    the compiled loop (of sm_100, whose warps have each their own, in that which adds); `programs`
    how many fit on a multiprocessor at once. `registers` caps those of a thread, where the
    assembler would take more than it needs. `step` is how many numbers of the sum a
    turn of the loop takes (of FP8, the kernel says it).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    hot: int
    programs: int
    registers: int | None = None
    step: int = 128

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Gemm:
    """What is cut: rows of x, columns of y, the width that is summed over, bytes of a number.

    The rows may be those of several experts, each with a weight of its own.
    """

    rows: int
    columns: int
    width: int
    itemsize: int
    experts: int = 1

    def tiles(self, tile: GemmTile) -> int:
        """One at least for each expert that has rows; of several, half a one is to spare."""
        high = -(-self.rows // tile.rows)
        if self.experts > 1:
            high = max(min(self.rows, self.experts), self.rows // tile.rows + self.experts // 2)
        return high * -(-self.columns // tile.columns)

    def nbytes(self) -> int:
        """What must be read: the rows, and the weights of those experts that have any."""
        weights = self.columns * min(self.rows, self.experts)
        return (self.rows + weights) * self.width * self.itemsize


BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""Rows for which tiles are chosen; a number between two is served as the larger one, more than the
last as the last."""

START = 1500
"""Clocks until the first product of a program can begin: addresses, first loads from memory."""

SHARED_CACHE = 32
"""Bytes a clock that a multiprocessor gets from the shared cache while all of them read."""


CLOCK = {"sm_90": 1.755e9, "sm_100": 1.85e9, "gfx942": 2.1e9}
"""Clocks a second at which the published peaks hold."""


def clocks(tile: GemmTile, product: Gemm, target: Target) -> tuple[float, float]:
    """Clocks that it takes at least, and those that a multiprocessor is busy with it.

    On sm_90 a warp waits for its products: what it does beside adds up, unless there is another
    program whose warps work meanwhile. Elsewhere what takes longest counts: sm_100 has warps for
    each, and gfx942 goes on with what does not depend on the product.
    """
    second = CLOCK[target.name]
    flops = target.flops["fp8" if product.itemsize == 1 else "bf16"] / second
    unit = 2 * tile.rows * tile.columns * GROUP_SIZE / (flops / target.multiprocessors)
    # Four schedulers; a warp of 64 passes in four clocks.
    issue = tile.hot * tile.warps / 4 * (4 if target.warp_size == 64 else 1)
    cache = (tile.rows + tile.columns) * GROUP_SIZE * product.itemsize / SHARED_CACHE
    beside = tile.programs > 1 or target.name != "sm_90"
    step = max(unit, issue, cache) if beside else max(unit + issue, cache)
    turns = -(-product.tiles(tile) // target.multiprocessors)
    busy = turns * -(-product.width // GROUP_SIZE) * step + -(-turns // tile.programs) * START
    return max(busy, product.nbytes() / (target.bandwidth / second)), busy


Steps = tuple[tuple[int | None, GemmTile], ...]
"""Up to how many rows, and the tile for them; the last one for any number."""


def steps(
    name: str, tiles: Sequence[GemmTile], product: Gemm, target: Target, tuning: TuningTable
) -> Steps:
    """A tile for each of `BUCKETS` rows of a product, those measured or else the cheapest; equal
    neighbours in one. `name` is what `tuning_key` calls the product."""
    found: list[tuple[int | None, GemmTile]] = []
    for rows in BUCKETS:
        sized = replace(product, rows=rows)
        best = min(tiles, key=lambda tile: clocks(tile, sized, target))
        candidates = {tile.name: tile for tile in tiles}
        tile = tuning.pick(tuning_key(name, product.columns, rows), candidates, best.name)
        if found and found[-1][1] == tile:
            found.pop()
        found.append((rows, tile))
    return (*found[:-1], (None, found[-1][1]))


def by_columns(
    name: str,
    tiles: Sequence[GemmTile],
    products: Iterable[Gemm],
    target: Target,
    tuning: TuningTable,
) -> dict[int, Steps]:
    """`steps` by columns of the product; of several that have as many, the widest decides."""
    widest: dict[int, Gemm] = {}
    for product in products:
        known = widest.setdefault(product.columns, product)
        widest[product.columns] = max(known, product, key=lambda one: (one.width, one.experts))
    return {
        columns: steps(name, tiles, product, target, tuning)
        for columns, product in sorted(widest.items())
    }


def tuning_key(name: str, columns: int, rows: int) -> str:
    """Under which key a tile for that many rows is measured: `fp8_linear n7168 m4096`."""
    bucket = next((most for most in BUCKETS if rows <= most), BUCKETS[-1])
    return f"{name} n{columns} m{bucket}"


FP8 = {
    "sm_90": (
        GemmTile(16, 64, warps=4, stages=4, hot=79, programs=2, registers=96),
        GemmTile(16, 128, warps=8, stages=3, hot=81, programs=2, registers=76),
        GemmTile(32, 64, warps=4, stages=3, hot=104, programs=3, registers=96),
        GemmTile(32, 128, warps=8, stages=3, hot=116, programs=1, registers=96),
        GemmTile(64, 64, warps=8, stages=2, hot=82, programs=3, registers=63),
        GemmTile(64, 128, warps=8, stages=2, hot=104, programs=2, registers=106),
        GemmTile(128, 128, warps=8, stages=3, hot=140, programs=1, registers=168),
    ),
    "sm_100": (
        GemmTile(16, 64, warps=4, stages=6, hot=59, programs=1),
        GemmTile(16, 128, warps=4, stages=6, hot=102, programs=1),
        GemmTile(32, 128, warps=4, stages=6, hot=178, programs=1),
        GemmTile(64, 128, warps=4, stages=4, hot=67, programs=1),
        GemmTile(128, 128, warps=8, stages=4, hot=68, programs=1),
    ),
    "gfx942": (
        GemmTile(16, 64, warps=4, stages=2, hot=182, programs=2),
        GemmTile(32, 64, warps=4, stages=2, hot=393, programs=2),
        GemmTile(64, 128, warps=4, stages=2, hot=95, programs=2),
        GemmTile(128, 128, warps=8, stages=2, hot=92, programs=1),
    ),
}
"""Tiles of FP8 products. On sm_90 a stage holds two runs of 128. With two stages the loop loads the
next two when it has multiplied, and waits for them: another program works meanwhile. The largest
tile, which is alone, has three, of which one is being loaded while another is multiplied. Tiles of
less than 64 rows put W in the place of x: tensor cores of sm_90 multiply FP8 only for 64 rows and
more. None has more than the 128 columns of a block of W, so that one number scales a tile."""

FP8_GROUPED = {
    **FP8,
    "gfx942": (
        GemmTile(16, 64, warps=4, stages=2, hot=181, programs=2),
        GemmTile(32, 64, warps=4, stages=2, hot=393, programs=2),
        GemmTile(64, 128, warps=4, stages=2, hot=673, programs=2),
    ),
}
"""Tiles of experts; on gfx942 their weights are converted while they are read, for every tile."""

FP8_OUTER = {
    "sm_90": GemmTile(128, 128, warps=8, stages=3, hot=259, programs=1),
    "sm_100": GemmTile(128, 64, warps=8, stages=4, hot=128, programs=1),
    "gfx942": GemmTile(128, 128, warps=8, stages=2, hot=144, programs=1),
}
"""Tiles of weight gradients, which scale every row and every column."""

BF16 = {
    "sm_90": (
        GemmTile(16, 64, warps=4, stages=4, hot=138, programs=2),
        GemmTile(32, 64, warps=4, stages=4, hot=144, programs=2),
        GemmTile(64, 64, warps=4, stages=4, hot=236, programs=3, step=64),
        GemmTile(64, 128, warps=4, stages=4, hot=314, programs=2, step=64),
        GemmTile(128, 128, warps=8, stages=4, hot=234, programs=1, step=64),
        GemmTile(128, 256, warps=8, stages=3, hot=312, programs=1, step=64),
    ),
    "sm_100": (
        GemmTile(16, 64, warps=4, stages=4, hot=79, programs=1),
        GemmTile(16, 128, warps=4, stages=4, hot=79, programs=1),
        GemmTile(32, 128, warps=4, stages=4, hot=79, programs=1),
        GemmTile(64, 128, warps=4, stages=4, hot=100, programs=1, step=64),
        GemmTile(128, 128, warps=4, stages=4, hot=98, programs=1, step=64),
        GemmTile(128, 256, warps=8, stages=4, hot=96, programs=1, step=64),
    ),
    "gfx942": (
        GemmTile(16, 64, warps=4, stages=2, hot=54, programs=2),
        GemmTile(32, 64, warps=4, stages=2, hot=86, programs=2),
        GemmTile(64, 128, warps=4, stages=2, hot=156, programs=2, step=64),
        GemmTile(128, 256, warps=8, stages=2, hot=200, programs=1, step=64),
    ),
}
"""Tiles of products in bfloat16, whose sums stay in the tensor cores."""

BF16_OUTER = {
    "sm_90": GemmTile(128, 128, warps=8, stages=4, hot=260, programs=1, step=64),
    "sm_100": GemmTile(128, 128, warps=4, stages=4, hot=260, programs=1, step=64),
    "gfx942": GemmTile(128, 128, warps=8, stages=2, hot=200, programs=1, step=64),
}
"""Tiles of the weight gradients of experts, whose slots begin anywhere."""
