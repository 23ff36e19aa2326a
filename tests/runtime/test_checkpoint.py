from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.checkpoint import save
from runtime.shards import LoadError
from tests.support.tiny import Model

State = dict[str, Tensor]
HEAD = "lm_head.weight"
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"
COPY = "model.layers.2.embed_tokens.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model() -> Model:
    made = Model(dtype=torch.float32, seed=3)
    made.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.rand(8))
    return made


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def state(saved: Path) -> State:
    return load_file(saved / "model.safetensors")


def write(folder: Path, **files: State) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def problems(folder: Path) -> set[tuple[str, str]]:
    """What `load` refuses; the model stays as it was."""
    model = Model(seed=4)
    with pytest.raises(LoadError) as caught:
        model.load(folder)
    assert_equal(model.state_dict(), Model(seed=4).state_dict())
    meta = Model(device="meta")
    with pytest.raises(LoadError):
        meta.load(folder)
    assert meta.device.type == "meta"
    return {(problem.text, problem.name) for problem in caught.value.problems}


def test_what_was_saved_loads_again(model: Model, saved: Path) -> None:
    other = Model(dtype=torch.float32, seed=9)
    report = other.load(saved)
    assert_equal(other.state_dict(), model.state_dict())
    assert (report.files, report.total, report.read, report.aliased) == (1, 97, 95, 2)
    assert report.dequantized == 0
    assert report.bytes == sum(t.nbytes for t in model.state_dict().values())
    assert str(report).startswith(f"read 95 tensors (0.00 GB) from {saved} in ")


def test_a_meta_model_gets_its_memory(model: Model, saved: Path) -> None:
    meta = Model(device="meta")
    meta.load(saved)
    assert meta.dtype == torch.bfloat16 and meta.device.type == "cpu"
    assert all(p.requires_grad for p in meta.parameters())
    for name, tensor in meta.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))
    assert meta.state_dict()[BIAS].dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_cast(state: State, tmp_path: Path, stored: torch.dtype) -> None:
    cast = {name: tensor.to(stored) for name, tensor in state.items()}
    model = Model(dtype=torch.float32)
    model.load(write(tmp_path, model=cast))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, cast[name].float())


def test_copies_may_be_absent(state: State, tmp_path: Path) -> None:
    for copy in Model.aliases:
        del state[copy]
    report = Model().load(write(tmp_path, model=state))
    assert (report.read, report.aliased) == (95, 0)


def quantize(state: State, name: str) -> Tensor:
    """Puts an FP8 weight and a scale for its one block into `state`; gives what they stand for."""
    weight = state[name].to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 1.7)
    state[name], state[f"{name}_scale_inv"] = weight, scale
    return weight.float() * scale


def test_fp8_is_multiplied_by_scales_also_from_another_file(state: State, tmp_path: Path) -> None:
    expected = {name: quantize(state, name) for name in (EXPERT, "model.layers.2.eh_proj.weight")}
    other = {f"{EXPERT}_scale_inv": state.pop(f"{EXPERT}_scale_inv")}
    model = Model(dtype=torch.float32)
    report = model.load(write(tmp_path, a=state, b=other))
    assert (report.files, report.total, report.read, report.dequantized) == (2, 99, 95, 2)
    assert "dequantized from FP8 with 128 x 128 scales: 2" in str(report)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value)


def test_every_problem_is_told_at_once(state: State, tmp_path: Path) -> None:
    quantize(state, EXPERT)
    del state[f"{EXPERT}_scale_inv"]
    quantize(state, HEAD)
    state[f"{HEAD}_scale_inv"] = torch.ones(2, 1)
    state["model.layers.0.input_layernorm.weight_scale_inv"] = torch.ones(1, 1)
    state["model.norm.weight"] = torch.ones(63)
    state["model.layers.0.input_layernorm.weight"] = torch.ones(64, dtype=torch.int32)
    del state["model.layers.0.mlp.up_proj.weight"]
    state["model.layers.3.enorm.weight"] = torch.ones(64)
    state[COPY] = -state[COPY]
    assert problems(write(tmp_path, model=state)) == {
        ("FP8 without its scales (a matrix NAME_scale_inv)", EXPERT),
        (
            "its scales (NAME_scale_inv) are F32 [2, 1], "
            "expected F32 [1, 1] for blocks of 128 x 128",
            HEAD,
        ),
        ("differs from model.embed_tokens.weight, whose copy it should be", COPY),
        ("not a tensor of this model", "model.layers.0.input_layernorm.weight_scale_inv"),
        ("of shape [63], the model has [64]", "model.norm.weight"),
        ("stored as I32, which is no weight", "model.layers.0.input_layernorm.weight"),
        ("missing", "model.layers.0.mlp.up_proj.weight"),
        ("not a tensor of this model", "model.layers.3.enorm.weight"),
    }


def test_a_copy_that_differs_is_refused(state: State, tmp_path: Path) -> None:
    state[COPY] = state[COPY].clone()
    state[COPY][0, 0] += 1
    text = "differs from model.embed_tokens.weight, whose copy it should be"
    assert problems(write(tmp_path, model=state)) == {(text, COPY)}


def test_a_tensor_in_two_files_is_refused(state: State, tmp_path: Path) -> None:
    folder = write(tmp_path, a=state, b={HEAD: state[HEAD]})
    assert problems(folder) == {("in two files, a.safetensors and b.safetensors", HEAD)}


def test_a_folder_without_weights_gives_one_reason(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    text = "a pickle can run code and is not read; convert to safetensors"
    assert problems(tmp_path) == {(text, "pytorch_model.bin")}


@pytest.mark.slow
def test_a_file_cut_off_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    for length in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        ((text, name),) = problems(tmp_path)
        assert text.startswith("damaged, cut off") and name == "model.safetensors"


@pytest.mark.slow
@given(st.integers(0, 9000), st.integers(1, 255))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_harmless(
    saved: Path, tmp_path: Path, place: int, flip: int
) -> None:
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[place] ^= flip
    (tmp_path / "model.safetensors").write_bytes(content)
    try:
        Model(device="meta").load(tmp_path)
    except LoadError as error:
        assert error.problems


def test_shards_are_filled_in_order_and_indexed(model: Model, tmp_path: Path) -> None:
    limit = 40_000
    save(model, tmp_path / "sharded", max_shard_bytes=limit)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    state, placed = model.state_dict(), index["weight_map"]
    assert placed.keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    files = sorted(set(placed.values()))
    count = len(files)
    assert count > 3
    assert files == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for file in files:
        stored = load_file(tmp_path / "sharded" / file)
        assert stored.keys() == {name for name, place in placed.items() if place == file}
        assert sum(t.nbytes for t in stored.values()) <= limit or len(stored) == 1
    other = Model(dtype=torch.float32)
    assert other.load(tmp_path / "sharded").files == count
    assert_equal(other.state_dict(), state)


def test_a_small_model_is_one_file_with_its_config(model: Model, saved: Path) -> None:
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config == {**Model.hf_config, "torch_dtype": "float32"}


def test_saving_again_replaces_the_whole_checkpoint(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    save(model, folder, max_shard_bytes=40_000)
    Model(seed=8).save(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["x"]
    other = Model(seed=1)
    other.load(folder)
    assert_equal(other.state_dict(), Model(seed=8).state_dict())


def test_a_new_folder_has_ordinary_rights(model: Model, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    model.save(tmp_path / "deep" / "er" / "x")
    rights = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "deep" / "er" / "x").stat().st_mode == rights


@pytest.mark.parametrize("files", [["notes.txt"], ["config.json"], ["model.safetensors", "x.py"]])
def test_a_folder_of_something_else_is_never_replaced(
    model: Model, tmp_path: Path, files: list[str]
) -> None:
    for name in files:
        (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match="choose another folder"):
        model.save(tmp_path)
    assert [(tmp_path / name).read_text() for name in files] == ["precious"] * len(files)
    with pytest.raises(FileExistsError, match="is a file"):
        model.save(tmp_path / files[0])


def broken_save(*args: object, **settings: object) -> None:
    raise OSError(28, "No space left on device")


def broken_rename(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise PermissionError(13, "Permission denied")
        return original(self, target)

    return rename


@pytest.mark.parametrize("fails", ["write", "rename"])
def test_a_failed_save_leaves_the_old_checkpoint(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    folder = tmp_path / "x"
    model.save(folder)
    before = (folder / "model.safetensors").read_bytes()
    if fails == "write":
        monkeypatch.setattr("runtime.checkpoint.save_file", broken_save)
    else:
        monkeypatch.setattr(Path, "rename", broken_rename(Path.rename))
    with pytest.raises(OSError):
        Model(seed=5).save(folder)
    assert os.listdir(tmp_path) == ["x"]
    assert (folder / "model.safetensors").read_bytes() == before


def test_saving_is_the_same_bytes_each_time(model: Model, saved: Path, tmp_path: Path) -> None:
    model.save(tmp_path / "again")
    for name in os.listdir(saved):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_a_model_without_weights_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights to save"):
        Model(device="meta").save(tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_constants_that_follow_from_the_config_may_be_among_the_tensors(
    model: Model, state: State, tmp_path: Path
) -> None:
    """Files of Moonlight and Kimi-K2 hold the frequencies of rotary embedding in each layer."""
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    other = Model(dtype=torch.float32, seed=9)
    other.load(write(tmp_path / "given", model=state))
    assert_equal(other.state_dict(), model.state_dict())
    state["model.layers.0.self_attn.rotary_emb.other"] = torch.ones(4)
    name = "model.layers.0.self_attn.rotary_emb.other"
    assert problems(write(tmp_path / "more", model=state)) == {("not a tensor of this model", name)}
