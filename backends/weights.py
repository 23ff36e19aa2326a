"""Weights between checkpoints: which folder holds those of which model, and how they are stored.

The work is done by `runtime/convert.py`; this module gives it what a model consists of, which its
spec says, and the `config.json` that is written next to weights in BF16 or FP8.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.read import read_build, read_run
from compiler.graph.core import Program
from compiler.lower import lower
from compiler.published import Published, kept_modules, published
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.hf import (
    KEPT,
    hf_config,
    language_model,
    read_config,
    spec_from_hf,
    unread_tensors,
)
from dsl.load import Description, load
from dsl.read import read_source
from dsl.source import Source

if TYPE_CHECKING:
    from runtime.audit import Table
    from runtime.convert import ConversionProgress as ConversionProgress
    from runtime.recode import StorageFormat, TensorSpec
    from runtime.shards import Problem

CONFIG = "config.json"
DEPTH = "num_nextn_predict_layers"
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
"""`quantization_config` of DeepSeek-V3: which weights are FP8 is known from their scales."""
SCALES = "scale_fmt"
"""In `quantization_config`, as in DeepSeek-V3.1; next to weights in BF16 a key of its own."""
PREFIX = "language_model."
"""Of the weights of a language model that is a part of a larger one."""
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
"""Files that go along with weights unchanged."""
MOST = 200_000
"""Weights of a model; DeepSeek-V3 has 46,183."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of weights, and the model whose weights they are to be.

    `seed` is what their first values came from, where it is known; `scale` how its FP8 scales are
    kept, `fp32` or `ue8m0`; `prefix` what names in the folder begin with, where the model is a part
    of a larger one; `unread` are tensors there that are no part of it; `beside`
    are files that go along; `notes` are for people.
    """

    folder: Path
    tensors: tuple[Published, ...]
    config: Mapping[str, Any]
    scale: str
    seed: int | None = None
    prefix: str = ""
    unread: frozenset[str] = frozenset()
    beside: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def checkpoint_in(folder: Path, spec: Description | None = None) -> Checkpoint:
    """The weights in a folder: of the model of its config.json, or of `spec`.

    Raises `DiagnosticError` if there is no such model.
    """
    notes = []
    if spec is not None:
        config, description = hf_config(spec), spec
    else:
        config = {**language_model(read_config(_config_source(folder)))}
        description = description_of(folder)
        if config.get(DEPTH) and not description.spec.architecture.mtp.depth:
            config[DEPTH] = 0
            notes.append(f"{folder} declares MTP modules and holds no tensor of them: left out")
    tensors, (names, _) = _tensors(lower(description), _kept(config)), _names(folder)
    prefix = _prefix(names, tensors)
    others = sum(not name.startswith(prefix) for name in names)
    if others:
        notes.append(f"{folder} has {others} tensors besides {prefix}*, the model: left out")
    unread = unread_tensors(config, (name.removeprefix(prefix) for name in names))
    notes += [
        f"{folder} has {len(found)} tensors {what}: left out" for what, found in unread.items()
    ]
    return Checkpoint(
        folder,
        tensors,
        config,
        _scale(config),
        None,
        prefix,
        frozenset(name for found in unread.values() for name in found),
        _files(folder, BESIDE),
        tuple(notes),
    )


def description_of(folder: Path, sets: Sequence[str] = ()) -> Description:
    """The model of a folder's config.json, called `imported`. Raises `DiagnosticError`.

    Without MTP modules that it declares and no file holds a tensor of. `sets` are as of `load`.
    """
    source = _config_source(folder)
    config = read_config(source)
    description = _described(config, source, sets)
    if description.spec.architecture.mtp.depth:
        names, unread = _names(folder)
        part = language_model(config)
        if not unread and not _has_mtp(names, part["num_hidden_layers"]):
            return _described({**part, DEPTH: 0}, source, sets)
    return description


def _described(config: Mapping[str, Any], source: Source, sets: Sequence[str]) -> Description:
    """The model of a config.json, whose text is `source`."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "imported.yaml"
        path.write_text(spec_from_hf(config, source, "imported"), encoding="utf-8")
        return load(path, sets=sets)


def _names(folder: Path) -> tuple[list[str], bool]:
    """The tensors in a folder, and whether it has files that cannot be read."""
    from runtime.shards import Shards

    with Shards(folder) as shards:
        return list(shards.entries), bool(shards.problems)


def _has_mtp(names: Iterable[str], layers: int) -> bool:
    """Whether a layer after the last is among the names of tensors.

    transformers declares such layers in what it saves, 1 by default, and never saves them.
    """
    found = (re.match(r"(?:language_model\.)?model\.layers\.(\d+)\.", name) for name in names)
    return any(layer and int(layer[1]) >= layers for layer in found)


def _prefix(names: Iterable[str], tensors: Iterable[Published]) -> str:
    """What the names in a folder begin with, where the model is a part of a larger one."""
    own = any(one.name.startswith(PREFIX) for one in tensors)
    return PREFIX if not own and any(name.startswith(PREFIX) for name in names) else ""


def _config_source(folder: Path) -> Source:
    return read_source(folder / CONFIG, str(folder / CONFIG))


def checkpoint_of(run: Path, average: bool = False) -> Checkpoint:
    """The newest weights of a run of `dslc train`, or their moving average.

    What the model is, the build in the run says; nothing of that is run. Raises `DiagnosticError`
    for a run that is damaged, has no checkpoint or no moving average (E612).
    """
    from runtime.train.checkpoints import Checkpoints
    from runtime.train.settings import TrainError
    from runtime.train.state import AVERAGE, MODEL

    record = read_run(run)
    model, seed = record["model"], record["seed"]
    try:
        newest = Checkpoints(run / "checkpoints", keep=1).newest()
    except TrainError as error:
        raise DiagnosticError([Diagnostic("E612", str(error))]) from None
    if newest is None:
        raise DiagnosticError([Diagnostic("E612", f"{run} has no checkpoint yet")])
    folder = newest / (AVERAGE if average else MODEL)
    if not folder.is_dir():
        message = f"{newest} has no moving average: the spec sets no train.ema"
        raise DiagnosticError([Diagnostic("E612", message)])
    lowered = read_build(run / model).lowered
    source = read_source(run / model / "config.py", str(run / model / "config.py"))
    # Tokens have a tokenizer beside them if they are not bytes.
    beside = _files(run / str(record.get("tokens")), ("tokenizer.json",))
    config = _hf_config(source)
    return Checkpoint(folder, _tensors(lowered), config, _scale(config), seed, beside=beside)


def _hf_config(source: Source) -> dict[str, Any]:
    """HF_CONFIG of a build's config.py, read as the literal that it is."""
    try:
        for node in ast.parse(source.text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HF_CONFIG":
                return dict(ast.literal_eval(node.value))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    help = "build the model again"
    raise DiagnosticError([Diagnostic("E604", f"{source.name} gives no HF_CONFIG", help=help)])


def _kept(config: Mapping[str, Any]) -> Set[str]:
    """The modules that FP8 files of a config.json keep in BF16."""
    return {*(_quantization(config).get(KEPT) or config.get(KEPT) or ())}


def _is_kept(name: str, modules: Set[str]) -> bool:
    """Whether a weight is that of a module: by its name, a part of it, or one around it."""
    parts = name.split(".")
    ends = range(1, len(parts))
    return bool(modules) and any(".".join(parts[i:j]) in modules for j in ends for i in range(j))


def _tensors(lowered: Program, kept: Set[str] = frozenset()) -> tuple[Published, ...]:
    """Those of a model whose config.json or build a stranger may have written.

    What its FP8 files would hold in FP8 is not so where it belongs to a module `kept`.
    """
    found = tuple(islice(published(lowered), MOST + 1))
    if len(found) > MOST:
        raise DiagnosticError([Diagnostic("E610", f"the model has more than {MOST:,} weights")])
    return tuple(
        replace(one, fp8=False, kept=True) if one.fp8 and _is_kept(one.name, kept) else one
        for one in found
    )


def _files(folder: Path, names: Iterable[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names if (folder / name).is_file())


def _scale(config: Mapping[str, Any]) -> str:
    """How FP8 scales are kept: as powers of two, or not."""
    return "ue8m0" if "ue8m0" in (_quantization(config).get(SCALES), config.get(SCALES)) else "fp32"


def convert(
    checkpoint: Checkpoint,
    target: Path,
    *,
    fp8: bool,
    first_values: bool,
    max_file: int,
    report: Callable[[ConversionProgress], None],
) -> Table:
    """Writes a checkpoint to `target` in BF16, or with the weights of FP8 checkpoints in FP8.

    In files of at most `max_file` bytes. `first_values` allows tensors that still are what they
    began as. Raises `DiagnosticError` for weights that do not fit the model (E610) and for a target
    that cannot be used (E611), OSError.
    """
    from runtime.convert import ConversionError, TargetError, convert
    from runtime.recode import StorageFormat

    form = StorageFormat(fp8, checkpoint.scale, checkpoint.seed, first_values)
    wanted = list(_wanted(checkpoint.tensors))
    kept = kept_modules(checkpoint.tensors)
    files = {CONFIG: _json(_config(checkpoint.config, form, kept))}
    try:
        return convert(
            checkpoint.folder,
            target,
            wanted,
            form,
            files,
            prefix=checkpoint.prefix,
            unread=checkpoint.unread,
            beside=checkpoint.beside,
            max_shard_bytes=max_file,
            report=report,
        )
    except TargetError as error:
        (one,) = error.problems
        help = "choose another folder with --to, or move this one away"
        raise DiagnosticError([Diagnostic("E611", f"{one.name} {one.text}", help=help)]) from None
    except ConversionError as error:
        raise DiagnosticError(_problems(error.problems, checkpoint)) from None
    except OSError as error:  # that of a write does not say where
        raise OSError(error.errno, error.strerror, error.filename or str(target)) from None


HELP = {
    "left at": "if it is meant to be so: --first-values",
    "has other bytes": "if it was changed on purpose, move audit.json away",
}
"""By the beginning of a problem."""


def _problems(problems: Iterable[Problem], checkpoint: Checkpoint) -> Iterator[Diagnostic]:
    """One for each thing that is wrong; names that differ only in numbers are reported as one."""
    from runtime.shards import gather

    by_text: dict[str, list[str]] = {}
    for one in problems:
        by_text.setdefault(one.text, []).append(one.name)
    for layer, absent in _absent_mtp(by_text.get("missing", ()), checkpoint).items():
        by_text["missing"] = [name for name in by_text["missing"] if name not in absent]
        message = f"the MTP module (layer {layer}) is declared, and no tensor of it is in the files"
        help = (
            f"if it was never saved, set {DEPTH} in config.json, or architecture.mtp.depth of "
            "the spec, to the number of modules that were"
        )
        yield Diagnostic("E610", message, help=help)
    for text, names in by_text.items():
        help = next((help for start, help in HELP.items() if text.startswith(start)), "")
        for line in gather(names):
            yield Diagnostic("E610", f"{line}: {text}", help=help)


def _absent_mtp(missing: Sequence[str], checkpoint: Checkpoint) -> dict[int, set[str]]:
    """MTP modules, by their number among the layers, whose tensors are all that is missing."""
    first = checkpoint.config.get("num_hidden_layers")
    found: dict[int, set[str]] = {}
    for one in checkpoint.tensors:
        layer = re.match(r"model\.layers\.(\d+)\.", one.name)
        if layer and isinstance(first, int) and int(layer[1]) >= first and not one.copy_of:
            found.setdefault(int(layer[1]), set()).add(one.name)
    absent = {layer: names for layer, names in found.items() if names <= {*missing}}
    return absent if {*missing} == set().union(*absent.values()) else {}


def _wanted(tensors: tuple[Published, ...]) -> Iterator[TensorSpec]:
    """In BF16, but for what a model in BF16 has in float32, too."""
    from runtime.recode import TensorSpec

    mixed = any(one.dtype == "bf16" for one in tensors)
    for one in tensors:
        wide = not one.trainable or (mixed and one.dtype == "f32")
        dtype = "F32" if wide else "BF16"
        yield TensorSpec(one.name, one.shape, dtype, one.fp8, one.value, one.std, one.copy_of)


def _config(config: Mapping[str, Any], form: StorageFormat, modules: list[str]) -> dict[str, Any]:
    """The same model, stored in another way, with `modules` in BF16; without code."""
    dropped = ("quantization_config", SCALES, KEPT, "auto_map", "dtype", "torch_dtype")
    kept = {key: value for key, value in config.items() if key not in dropped}
    kept["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    more: dict[str, Any] = {SCALES: "ue8m0"} if form.scale == "ue8m0" else {}
    more |= {KEPT: modules} if modules else {}
    return kept | ({"quantization_config": FP8 | more} if form.fp8 else more)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
