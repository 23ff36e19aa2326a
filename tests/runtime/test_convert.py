"""From folder to folder: what comes out, what is refused, and what is kept of a broken attempt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime import recode
from runtime.audit import AUDIT
from runtime.convert import ConversionError, ConversionProgress, TargetError, convert
from runtime.recode import StorageFormat, TensorSpec
from runtime.weights import first_values
from tests.support.places import ROOT

E4M3 = torch.float8_e4m3fn
State = dict[str, Tensor]
WANTED = (
    TensorSpec("embed.weight", (40, 300), "BF16", std=0.02),
    TensorSpec("layers.0.proj.weight", (130, 260), "BF16", fp8=True, std=0.02),
    TensorSpec("layers.0.norm.weight", (300,), "BF16", value=1.0),
    TensorSpec("layers.1.proj.weight", (256, 128), "BF16", fp8=True, std=0.02),
    TensorSpec("layers.1.norm.weight", (300,), "BF16", value=1.0),
    TensorSpec("layers.1.bias", (7,), "F32"),
    TensorSpec("layers.1.embed.weight", (40, 300), "BF16", std=0.02, copy_of="embed.weight"),
)
COPY = "layers.1.embed.weight"
SMALL = 40_000
"""Bytes of a file, so that there are several."""


def weights(dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(5)
    values = {w.name: torch.randn(w.shape, generator=generator) for w in WANTED if not w.copy_of}
    return {n: v if n == "layers.1.bias" else v.to(dtype) for n, v in values.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "in", weights())


def write(folder: Path, tensors: State, name: str = "model") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    return folder


def read(folder: Path) -> State:
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


PLAIN = StorageFormat()


def run(source: Path, target: Path, form: StorageFormat = PLAIN, **settings: object) -> State:
    convert(source, target, WANTED, form, {"config.json": "{}"}, **settings)  # type: ignore[arg-type]
    return read(target)


def refused(
    source: Path, target: Path, form: StorageFormat = PLAIN, **settings: object
) -> set[str]:
    with pytest.raises(ConversionError) as caught:
        run(source, target, form, **settings)
    assert not target.exists()
    return {f"{problem.name}: {problem.text}" for problem in caught.value.problems}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- values ---------------------------------------------------------------------------------


def test_bf16_is_rounded_once_and_copies_are_written(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "out")
    expected = weights(torch.bfloat16)
    expected[COPY] = expected["embed.weight"]
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor)


def test_bf16_there_and_back_has_equal_bits(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    run(tmp_path / "out", tmp_path / "back")
    one, other = files_of(tmp_path / "out"), files_of(tmp_path / "back")
    assert one.pop(AUDIT) != other.pop(AUDIT)  # they say where they are from
    assert one == other


def scales(weight: Tensor, power: bool) -> Tensor:
    """The definition: the largest magnitude of each 128 x 128, at least 1e-4, is 448."""
    rows = []
    for strip in weight.float().split(128):
        largest = [max(1e-4, tile.abs().max().item()) for tile in strip.split(128, 1)]
        row = torch.tensor(largest, dtype=torch.float32) / 448
        rows.append(2 ** row.log2().ceil() if power else row)
    return torch.stack(rows)


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_fp8_has_the_scales_of_the_definition_and_the_error_of_one_rounding(
    folder: Path, tmp_path: Path, scale: str
) -> None:
    made = run(folder, tmp_path / "out", StorageFormat(fp8=True, scale=scale))
    back = run(tmp_path / "out", tmp_path / "back")
    exact = weights(torch.bfloat16)
    for one in WANTED:
        if not one.fp8:
            continue
        weight, stored = exact[one.name].float(), made[f"{one.name}_scale_inv"]
        assert made[one.name].dtype == E4M3 and stored.dtype == torch.float32
        assert torch.equal(stored, scales(weight, scale == "ue8m0"))
        s = stored.repeat_interleave(128, 0).repeat_interleave(128, 1)
        s = s[: weight.shape[0], : weight.shape[1]]
        # Three bits of mantissa, or the spacing of the subnormals; then the product in BF16.
        once = torch.maximum(weight.abs() * 2.0**-4, s * 2.0**-10)
        error = (back[one.name].float() - weight).abs()
        assert (error <= once * 1.001 + weight.abs() * 2.0**-8).all() and error.max() > 0
        assert torch.equal(back[one.name], (made[one.name].float() * s).bfloat16())


def test_fp8_of_float32_is_that_of_its_bf16(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "bf16")
    at_once = run(folder, tmp_path / "a", StorageFormat(fp8=True))
    by_way = run(tmp_path / "bf16", tmp_path / "b", StorageFormat(fp8=True))
    again = run(tmp_path / "b", tmp_path / "c", StorageFormat(fp8=True))  # FP8 keeps its bytes
    for name, tensor in at_once.items():
        for other in (by_way, again):
            assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_scales_may_be_of_another_type_and_in_another_file(folder: Path, tmp_path: Path) -> None:
    state = run(folder, tmp_path / "out", StorageFormat(fp8=True))
    scale = {n: state.pop(n).bfloat16() for n in list(state) if n.endswith("_scale_inv")}
    mixed = write(write(tmp_path / "mixed", state, "a"), scale, "b")
    made = run(mixed, tmp_path / "again", StorageFormat(fp8=True))
    for name, tensor in scale.items():
        assert made[name].dtype == torch.float32 and torch.equal(made[name], tensor.float())


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60_000), st.booleans(), st.sampled_from([1, 300 * 128, 10**6]))
def test_neither_files_nor_runs_of_rows_change_a_value(
    tmp_path_factory: pytest.TempPathFactory, size: int, fp8: bool, rows: int
) -> None:
    place = tmp_path_factory.mktemp("sizes")
    folder = write(place / "in", weights())
    whole = run(folder, place / "whole", StorageFormat(fp8=fp8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recode, "ROWS", rows)
        parts = run(folder, place / "parts", StorageFormat(fp8=fp8), max_shard_bytes=size)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8))
    index = json.loads((place / "parts" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(place / "parts" / file)
    for file in (place / "parts").glob("model-*"):
        held = load_file(file)
        weights_in_it = [n for n in held if not n.endswith("_scale_inv")]
        assert sum(t.nbytes for t in held.values()) <= size or len(weights_in_it) == 1


# ---- the audit ------------------------------------------------------------------------------


def test_the_audit_says_of_every_tensor_what_was_read_and_written(
    folder: Path, tmp_path: Path
) -> None:
    made = run(folder, tmp_path / "out", StorageFormat(fp8=True), max_shard_bytes=SMALL)
    audit = json.loads((tmp_path / "out" / AUDIT).read_text())
    assert (audit["from"], audit["fp8"], audit["scales"]) == ("in", True, "fp32")
    assert [row["name"] for row in audit["tensors"]] == [one.name for one in WANTED]
    assert {row["name"]: row["how"] for row in audit["tensors"]}["layers.1.bias"] == "copied"
    parts = {p["name"]: p for row in audit["tensors"] for p in row["written"]}
    assert parts.keys() == made.keys()
    for name, part in parts.items():
        assert part["shape"] == list(made[name].shape)
        assert name in load_file(tmp_path / "out" / part["file"])
        data = bytes(made[name].contiguous().view(torch.uint8).flatten().tolist())
        assert part["sha256"] == recode.StoredTensor(name, "F32", (), bytearray(data)).sha256
    (row,) = (row for row in audit["tensors"] if row["name"] == COPY)
    assert row["copy_of"] == "embed.weight" and row["read"][0]["name"] == "embed.weight"


def test_a_flipped_byte_is_found_by_the_audit_beside_it(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", max_shard_bytes=SMALL)
    file = next((tmp_path / "out").glob("model-00002-*"))
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    (problem,) = refused(tmp_path / "out", tmp_path / "back")
    assert problem.endswith(": has other bytes than audit.json beside it says")
    (tmp_path / "out" / AUDIT).write_text('{"tensors": [1]}')
    assert "audit.json: cannot be read" in refused(tmp_path / "out", tmp_path / "new").pop()


# ---- what is refused ------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_told_before_anything_is_written(tmp_path: Path) -> None:
    state = weights(torch.bfloat16)
    del state["layers.0.norm.weight"]
    state["layers.1.norm.weight"] = torch.ones(299)
    state["../../outside"] = torch.ones(3)
    state["layers.1.proj.weight"] = state["layers.1.proj.weight"].to(E4M3)
    state["layers.1.bias"] = torch.arange(7)
    state[COPY] = state["embed.weight"] + 1
    folder = write(tmp_path / "in", state)
    assert refused(folder, tmp_path / "out") == {
        "layers.0.norm.weight: missing",
        "layers.1.norm.weight: of shape [299], the model has [300]",
        "../../outside: not a tensor of this model",
        "layers.1.proj.weight: FP8 without its scales (a matrix NAME_scale_inv)",
        "layers.1.bias: stored as I64, which is no weight",
        f"{COPY}: differs from embed.weight, whose copy it should be",
    }
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3.4e38), (torch.float64, 1e300)])
def test_numbers_that_bf16_has_no_room_for(dtype: torch.dtype, most: float, tmp_path: Path) -> None:
    state = weights()
    state["layers.1.proj.weight"] = state["layers.1.proj.weight"].to(dtype)
    state["layers.1.proj.weight"][200, 5] = most
    found = refused(write(tmp_path / "in", state), tmp_path / "out")
    assert found == {"layers.1.proj.weight: holds numbers too large for BF16"}
    state["layers.1.proj.weight"][200, 5] = 65504  # the largest of float16
    state["layers.1.proj.weight"] = state["layers.1.proj.weight"].half()
    convert(write(tmp_path / "half", state), tmp_path / "out", WANTED, StorageFormat(), {})


def test_values_that_no_trained_weight_has(tmp_path: Path) -> None:
    state = weights()
    state["embed.weight"] = first_values("embed.weight", (40, 300), 0.0, 0.02, seed=8)
    state["layers.0.norm.weight"] = torch.ones(300)
    state["layers.1.bias"] = torch.zeros(7)
    state["layers.1.proj.weight"][200, 5] = float("nan")
    state["layers.0.proj.weight"][129, 259] = float("inf")
    folder = write(tmp_path / "in", state)
    finite = {f"layers.{i}.proj.weight: holds infinities or NaN" for i in (0, 1)}
    untouched = {
        "layers.0.norm.weight: left at its initial value, 1",
        "layers.1.bias: left at its initial value, 0",
    }
    drawn = {"embed.weight: left at its initial values"}
    assert refused(folder, tmp_path / "out") == finite | untouched
    assert refused(folder, tmp_path / "o2", StorageFormat(seed=8)) == finite | untouched | drawn
    assert refused(folder, tmp_path / "o3", StorageFormat(seed=9, fp8=True)) == finite | untouched
    assert refused(folder, tmp_path / "o4", StorageFormat(seed=8, first=True)) == finite
    assert os.listdir(tmp_path) == ["in"]  # nothing to go on with


def test_cut_off_files_and_pickles_and_ways_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert any("damaged, cut off" in text for text in refused(folder, tmp_path / "out"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    problems = refused(folder, tmp_path / "out")
    assert any("pytorch_model.bin: a pickle can run code" in text for text in problems)
    write(tmp_path, weights(), "secret")
    index = {"weight_map": dict.fromkeys(weights(), "../secret.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = refused(folder, tmp_path / "out")
    assert problems == {"../secret.safetensors: the index names a file that is not there"}


def test_a_target_that_is_there_is_not_touched(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    run(folder, target)  # empty
    before = files_of(target)
    with pytest.raises(TargetError, match="exists, and is not overwritten"):
        run(folder, target)
    with pytest.raises(TargetError, match="exists, and is not overwritten"):
        run(folder, folder / "model.safetensors")
    assert files_of(target) == before


# ---- broken off, and begun again ------------------------------------------------------------


def stop_at(shard: int) -> Callable[[ConversionProgress], None]:
    def report(now: ConversionProgress) -> None:
        if now.shard == shard:
            raise KeyboardInterrupt

    return report


def test_what_was_written_is_kept_and_what_is_damaged_is_not(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "whole", max_shard_bytes=SMALL)
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(KeyboardInterrupt):
        run(folder, target, max_shard_bytes=SMALL, report=stop_at(4))
    assert not target.exists()
    first, second, third = sorted(partial.glob("model-*.safetensors"))
    (left,) = partial.glob("*.part")
    assert left.name.startswith("model-00004")
    before = [path.stat().st_ino for path in (first, second, third)]
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    third.write_bytes(third.read_bytes()[:-1])
    seen: list[ConversionProgress] = []
    run(folder, target, max_shard_bytes=SMALL, report=seen.append)
    assert files_of(target) == files_of(tmp_path / "whole")
    after = [(target / path.name).stat().st_ino for path in (first, second, third)]
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]
    assert seen[0].kept == seen[0].bytes > 0 and seen[-1].bytes == seen[-1].total
    assert not partial.exists()


def test_another_conversion_does_not_go_on_with_it(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder, target, max_shard_bytes=SMALL, report=stop_at(2))
    others = [
        (StorageFormat(fp8=True), SMALL),
        (StorageFormat(scale="ue8m0"), SMALL),
        (StorageFormat(), 2 * SMALL),
    ]
    for form, size in others:
        with pytest.raises(TargetError, match="left by another conversion"):
            run(folder, target, form, max_shard_bytes=size)
    with pytest.raises(KeyboardInterrupt):
        run(folder, target, StorageFormat(first=True), max_shard_bytes=SMALL, report=stop_at(2))
    with pytest.raises(TargetError, match="left by another conversion"):
        run(folder, target, max_shard_bytes=SMALL)  # what was allowed meanwhile
    write(folder, weights())  # the same, but who knows
    with pytest.raises(TargetError, match="its source has changed"):
        run(folder, target, StorageFormat(first=True), max_shard_bytes=SMALL)


def test_two_at_once(folder: Path, tmp_path: Path) -> None:
    def report(now: ConversionProgress) -> None:
        with pytest.raises(TargetError, match="another conversion is at work"):
            run(folder, tmp_path / "out")

    run(folder, tmp_path / "out", report=report)


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, tmp_path / "whole", max_shard_bytes=SMALL)
    target, partial = tmp_path / "out", tmp_path / "out.partial"

    def report(now: ConversionProgress) -> None:
        if now.shard == 2:
            last = partial / f"model-00003-of-{now.shards:05}.safetensors.part"
            last.symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device; what is complete is kept"):
        run(folder, target, max_shard_bytes=SMALL, report=report)
    assert not target.exists() and not list(partial.glob("*.part"))
    assert len(list(partial.glob("model-*.safetensors"))) == 2
    run(folder, target, max_shard_bytes=SMALL)
    assert files_of(target) == files_of(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(OSError, match=r"0\.0 GB are to be written, and 0\.0 GB are free"):
            run(folder, tmp_path / "other")


MEMORY = """
import sys
from pathlib import Path
from runtime.convert import convert
from runtime.recode import StorageFormat, TensorSpec

def peak():
    # Not `ru_maxrss`: that counts the pages of the process that this one was forked from.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024

wanted = [TensorSpec(f"layers.{i}.weight", (1024, 2048), "BF16", True, std=1.0) for i in range(64)]
import torch
torch.ones(1, 128).float() @ torch.ones(128, 1)
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), wanted, StorageFormat(fp8=True), {})
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """512 MB in one file, which is sparse: 64 tensors of 8 MB that are read, 2 MB when written."""
    names = [f"layers.{i}.weight" for i in range(64)]
    size = 1024 * 2048 * 4
    header = json.dumps(
        {
            name: {
                "dtype": "F32",
                "shape": [1024, 2048],
                "data_offsets": [i * size, i * size + size],
            }
            for i, name in enumerate(names)
        }
    ).encode()
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 64 * size)
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6
