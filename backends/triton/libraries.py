"""Libraries that compute what a kernel does: which of them runs, at which sizes, in what order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from backends.render import render
from backends.triton.instances import OpInstances
from backends.triton.kernel import Arg, Case, KernelFile
from backends.triton.target import Target
from backends.triton.tuning_table import RowRange

Shape = tuple[int, ...]
Ranges = list[tuple[int, int | None]]


@dataclass(frozen=True)
class Library:
    """`kernels/NAME.py`, whose functions call a library; its text is `NAME.py.jinja`.

    `serves` and `title` are what `KernelFile` calls `serves` and `library`. `asked` is the key of
    `kernels` in a spec by which it can be asked for. `fits` says whether the library computes a
    case: where it does not, its function returns NotImplemented.
    """

    name: str
    title: str
    serves: Mapping[str, str]
    targets: tuple[str, ...]
    asked: str
    fits: Callable[[Case], bool]


@dataclass(frozen=True)
class Rivals:
    """A function at a shape: its own kernel, the libraries that compute it, and cases by rows."""

    path: str
    shape: Shape
    own: str
    libraries: tuple[Library, ...]
    cases: Mapping[int, Case]

    @property
    def what(self) -> str:
        """The key of `TuningTable`, without the number of rows."""
        return f"{self.path} {'x'.join(map(str, self.shape))}"

    @property
    def function(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def files(self) -> tuple[str, ...]:
        return (self.own, *(library.name for library in self.libraries))

    def ranges(self, instances: OpInstances) -> list[RowRange]:
        """Who serves how many rows: as the spec asks, or else as it was measured."""
        asked = getattr(instances.spec.kernels, self.libraries[0].asked)
        if asked in self.files:
            return [RowRange(1, None, asked)]
        if asked == "triton":
            return [RowRange(1, None, self.own)]
        return instances.tuning.ranges(self.what, self.files)


def with_libraries(
    own: Sequence[KernelFile],
    libraries: Sequence[Library],
    instances: OpInstances,
    target: Target,
) -> list[KernelFile]:
    """The files of a build: the libraries that serve a function at some size, then its own kernels,
    whose cases say by which keys they are compared with libraries."""
    keys: dict[tuple[str, str], str] = {}
    found = list(_rivals(own, libraries, target))
    for rivals in found:
        for rows, case in rivals.cases.items():
            key = keys[rivals.own, case.name] = f"{rivals.what} m{rows}"
            instances.tuning.files[key] = rivals.files
    served = [(rivals, rivals.ranges(instances)) for rivals in found]
    files = []
    for one in libraries:
        asked = getattr(instances.spec.kernels, one.asked) == one.name
        if (file := _library_file(one, served, asked)) is not None:
            files.append(file)
    for file in own:
        cases = (replace(c, size_key=keys.get((file.name, c.name), "")) for c in file.cases)
        files.append(replace(file, cases=tuple(cases)))
    return files


def _rivals(
    own: Sequence[KernelFile], libraries: Sequence[Library], target: Target
) -> Iterator[Rivals]:
    for file in own:
        for path in file.serves:
            here = [one for one in libraries if path in one.serves and target.name in one.targets]
            cases = [case for case in file.cases if case.function == path.rpartition(".")[2]]
            sizes: dict[Shape, dict[int, Case]] = {}
            for case in (case for case in cases if any(one.fits(case) for one in here)):
                shape, rows = size_of(case)
                sizes.setdefault(shape, {})[rows] = case
            for shape, by_rows in sizes.items():
                able = tuple(one for one in here if any(map(one.fits, by_rows.values())))
                yield Rivals(path, shape, file.name, able, by_rows)


def size_of(case: Case) -> tuple[Shape, int]:
    """What decides which file is the fastest: sizes that the spec fixes, and a number of rows.

    Of a product the shape of its weight, and its rows; of attention heads and their widths, and the
    queries of a sequence; of attention to latents heads and queries of a sequence, and sequences.
    """
    shapes = [arg.shape for arg in case.arguments if isinstance(arg, Arg)]
    if case.function.startswith("attention"):
        _, queries, heads, width = shapes[0]
        return (heads, width, shapes[2][-1]), queries
    if case.function == "latent_attention":
        batch, queries, heads, _ = shapes[0]
        return (heads, queries), batch
    if case.function == "linear_weight_grad":
        dy, x = shapes if len(shapes) == 2 else (shapes[0], shapes[2])
        tiled = len(dy) == 3  # [tiles, out, 128] and [tiles, in, 128], of tokens
        return ((dy[1], x[1]), dy[0] * dy[2]) if tiled else ((dy[1], x[1]), dy[0])
    return shapes[2 if len(shapes) > 2 else 1], shapes[0][0]


def _library_file(
    library: Library, served: Sequence[tuple[Rivals, Sequence[RowRange]]], asked: bool
) -> KernelFile | None:
    """The functions and sizes that fall to a library: any that it has if the spec asks for it."""
    fastest: dict[str, dict[Shape, Ranges]] = {}
    cases: dict[str, Case] = {}
    paths: dict[str, str] = {}
    for rivals, ranges in served:
        mine = [(one.first, one.last) for one in ranges if one.file == library.name]
        if mine:
            paths[rivals.path] = library.serves[rivals.path]
            fastest.setdefault(rivals.function, {})[rivals.shape] = mine
            for rows, case in rivals.cases.items():
                if _within(rows, mine):
                    key = f"{rivals.what} m{rows}"
                    cases[case.name] = replace(case, tuning_key="", size_key=key)
    if not paths:
        return None
    functions = [path.rpartition(".")[2] for path in paths]
    text = render(
        f"triton/{library.name}.py.jinja",
        functions=functions,
        fastest="" if asked else table(fastest),
    )
    when = {} if asked else {path: _when(fastest[path.rpartition(".")[2]]) for path in paths}
    return KernelFile(library.name, text, paths, tuple(cases.values()), library.title, when)


def table(fastest: Mapping[str, Mapping[Shape, Ranges]]) -> str:
    """The lines of a dict of functions, shapes and ranges of rows, where None is infinite."""
    lines = []
    for function, shapes in fastest.items():
        lines.append(f'    "{function}": {{')
        for shape, ranges in shapes.items():
            pairs = (f"({first}, {'inf' if last is None else last})" for first, last in ranges)
            lines.append(f"        {shape}: [{', '.join(pairs)}],")
        lines.append("    },")
    return "\n".join(lines)


def _when(shapes: Mapping[Shape, Ranges]) -> str:
    """`2 rows or more of 2112x7168, 24576x1536; 17 to 64 rows of 4096x7168`."""
    by_ranges: dict[str, list[str]] = {}
    for shape, ranges in shapes.items():
        rows = " and ".join(_rows(*one) for one in ranges)
        by_ranges.setdefault(rows, []).append("x".join(map(str, shape)))
    return "; ".join(f"{rows} of {', '.join(names)}" for rows, names in by_ranges.items())


def _rows(first: int, last: int | None) -> str:
    if last is None:
        return f"{first} rows or more" if first > 1 else "any rows"
    return f"{first} to {last} rows" if first < last else f"{first} rows"


def _within(rows: int, ranges: Ranges) -> bool:
    return any(first <= rows and (last is None or rows <= last) for first, last in ranges)
