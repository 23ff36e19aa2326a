from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.shards import LoadError, Problem, Shards, dequantize
from runtime.sources import Sources


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (576, 130), (5, 7), (129, 1)])
def test_dequantize_multiplies_each_block_by_its_scale(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    blocks = [-(-n // 128) for n in shape]
    scale = torch.rand(blocks, generator=generator)
    result = dequantize(weight, scale)
    assert result.dtype == torch.float32
    for i in range(0, shape[0], 31):
        for j in range(0, shape[1], 31):
            expected = weight[i, j].float() * scale[i // 128, j // 128]
            assert result[i, j] == expected


def test_names_that_differ_in_numbers_are_told_as_one() -> None:
    names = [f"layers.{i}.experts.{j}.up.weight" for i in range(3, 61) for j in (0, 9, 10)]
    problems = [Problem("missing", name) for name in [*names, "norm.weight"]]
    error = LoadError(Path("here"), problems)
    assert str(error).splitlines() == [
        "cannot load here; nothing was changed",
        "  missing: layers.{3..60}.experts.{0..10}.up.weight (174)",
        "  missing: norm.weight",
    ]
    assert len(error.problems) == 175


def test_names_from_files_reach_the_terminal_only_in_print() -> None:
    names = ["a\x1b[31m\n7", "\0" + "9" * 5000]
    message = str(LoadError(Path("here"), [Problem("missing", name) for name in names]))
    assert len(message.splitlines()) == 3
    assert all(line.isprintable() for line in message.splitlines())


def write(folder: Path, **files: dict[str, Tensor]) -> None:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_headers_of_all_files_are_one_table(tmp_path: Path) -> None:
    write(tmp_path, a={"x": torch.ones(2, 3).bfloat16()}, b={"y": torch.arange(4)})
    with Shards(tmp_path) as shards:
        assert not shards.problems
        entries = {e.name: (e.file.name, e.shape, e.dtype) for e in shards.entries.values()}
        assert entries == {
            "x": ("a.safetensors", (2, 3), "BF16"),
            "y": ("b.safetensors", (4,), "I64"),
        }
        assert shards.entries["x"].bytes == 12
        assert torch.equal(shards.values(shards.entries["x"]), torch.ones(2, 3).bfloat16())


def problems(folder: Path) -> list[tuple[str, str]]:
    with Shards(folder) as shards:
        return [(problem.text, problem.name) for problem in shards.problems]


def test_a_tensor_in_two_files_is_a_problem(tmp_path: Path) -> None:
    write(tmp_path, a={"x": torch.ones(2)}, b={"x": torch.ones(2)})
    assert problems(tmp_path) == [("in two files, a.safetensors and b.safetensors", "x")]


def test_the_index_must_agree_with_the_files(tmp_path: Path) -> None:
    write(tmp_path, a={"x": torch.ones(2)}, b={"y": torch.ones(2)}, c={"z": torch.ones(2)})
    index = tmp_path / "model.safetensors.index.json"
    placed = '{"x": "a.safetensors", "y": "a.safetensors", "w": "b.safetensors", "v": "../d"}'
    index.write_text(f'{{"weight_map": {placed}}}')
    assert problems(tmp_path) == [
        ("the index names a file that is not there", "../d"),
        ("not named by the index; move the file away, or the index", "c.safetensors"),
        ("the index says it is in a.safetensors, but it is not", "y"),
        ("the index says it is in b.safetensors, but it is not", "w"),
    ]


NUMBERED = {
    "model-00001-of-00003": {"a": torch.ones(2)},
    "model-00002-of-00003": {"b": torch.ones(2)},
    "model-00003-of-00003": {"c": torch.ones(2)},
}
INDEX = {name: f"{file}.safetensors" for file, held in NUMBERED.items() for name in held}


def told(folder: Path, **shapes: tuple[int, ...]) -> list[tuple[str, str]]:
    """What stands against reading tensors of these shapes."""
    with Shards(folder) as shards:
        return [(p.name, p.text) for p in Sources(shards, {**shapes, "d": (2,)}, {}).problems]


@pytest.mark.parametrize("damage", ["absent", "pointer", "cut off"])
@pytest.mark.parametrize("indexed", [True, False])
def test_of_a_file_that_cannot_be_read_its_tensors_are_not_told(
    tmp_path: Path, indexed: bool, damage: str
) -> None:
    write(tmp_path, **NUMBERED)
    if indexed:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": INDEX}))
    file = tmp_path / INDEX["b"]
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(
            b"version https://git-lfs.github.com/spec/" if damage == "pointer" else b""
        )
    found = dict(told(tmp_path, a=(2,), b=(2,), c=(2,)))
    expected = {
        "absent": "the index names a file" if indexed else "not there, though the names of others",
        "pointer": "a Git LFS pointer",
        "cut off": "damaged, cut off",
    }
    assert found.pop(file.name).startswith(expected[damage])
    # `d` is in no file that the index names; without one it may have been in that file.
    assert found == ({"d": "missing"} if indexed else {})


def test_files_of_which_none_is_absent_hide_nothing(tmp_path: Path) -> None:
    write(tmp_path, **NUMBERED)
    assert told(tmp_path, a=(2,), b=(2,), c=(2,), e=(2,)) == [("e", "missing"), ("d", "missing")]


def test_halves_of_fp8_weights_are_not_told_where_the_other_half_is_lost(tmp_path: Path) -> None:
    write(
        tmp_path,
        **{
            "model-00001-of-00002": {
                "w.weight": torch.ones(128, 128).to(torch.float8_e4m3fn),
                "v.weight_scale_inv": torch.ones(1, 1),
            }
        },
    )
    shapes = {"w.weight": (128, 128), "v.weight": (128, 128)}
    with Shards(tmp_path) as shards:
        (problem,) = Sources(shards, shapes, {}).problems
    assert problem.name == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["model-00001-of-99999999999", "x-00001-of-00001", "model-1-of-2"])
def test_names_that_count_nothing_are_only_names(tmp_path: Path, name: str) -> None:
    write(tmp_path, **{name: {"a": torch.ones(2)}})
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": [1]}', "[" * 100_000, "\udcff"]
)
def test_a_broken_index_is_a_problem(tmp_path: Path, text: str) -> None:
    write(tmp_path, a={"x": torch.ones(2)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems(tmp_path)
    assert problem[0].startswith("the index is not readable")


def test_folders_without_safetensors_are_explained(tmp_path: Path) -> None:
    assert problems(tmp_path / "absent") == [("no such folder", str(tmp_path / "absent"))]
    assert problems(tmp_path) == [("the folder holds no *.safetensors file", str(tmp_path))]
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    ((text, name),) = problems(tmp_path)
    assert name == "pytorch_model.bin" and "pickle" in text and "convert to safetensors" in text


def test_a_clone_without_git_lfs_is_told_as_what_it_is(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 455784\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with Shards(tmp_path) as shards:
        (problem,) = shards.problems
    assert problem.name == "model.safetensors"
    assert "Git LFS pointer" in problem.text and "git lfs pull" in problem.text
