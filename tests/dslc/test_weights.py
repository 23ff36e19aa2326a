"""`dslc import` and `dslc export`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compiler.lower import lower
from compiler.published import published
from dsl.hf import hf_config
from dsl.load import load
from dslc.weights import ProgressPrinter, progress_line
from runtime.convert import ConversionProgress
from tests.support.command import Run
from tests.support.places import ROOT, TEXT, TINY
from tests.support.trained import SETTINGS, built, part


def trained(folder: Path, name: str, **changes: str) -> Path:
    """A run of two steps."""
    package = built(folder, name, train__steps="2", **changes)
    text = folder / "text.txt"
    text.write_bytes(TEXT.read_bytes()[:3000])
    words = ["--out", str(folder / "run"), "--data", str(text), "--seed", "5"]
    assert part(package, "command").main(package.Model, words) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trained(tmp_path_factory.mktemp("run"), "exported_tiny", train__ema="0.5")
    (run / "data" / "tokenizer.json").write_text("{}")
    return run


def state(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(("options", "folder"), [([], "model"), (["--ema"], "ema")])
def test_a_run_is_exported_and_loads(
    dslc: Run, run: Path, tmp_path: Path, options: list[str], folder: str
) -> None:
    outcome = dslc("export", run, "--to", "out", *options)
    assert outcome.status == 0, outcome.err
    head, *rows, last = outcome.out.splitlines()
    assert head.split() == ["tensors", "shape", "read", "written", "bytes"]
    (experts,) = (row for row in rows if "experts.0..7.gate_proj.weight" in row)
    assert experts.split() == [
        "model.layers.1..2.mlp.experts.0..7.gate_proj.weight", "16", "16", "x", "32", "F32",
        "BF16", "cast", "16,384",
    ]  # fmt: skip
    assert last == "wrote out: every tensor and its hash are in out/audit.json"
    masters, exported = state(newest(run) / folder), state(tmp_path / "out")
    assert exported.keys() - masters.keys() == {
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight",
    }
    for name, tensor in masters.items():
        bias = name.endswith("e_score_correction_bias")
        assert torch.equal(exported[name], tensor if bias else tensor.bfloat16())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    model = sys.modules["exported_tiny"].Model()  # type: ignore[attr-defined]
    model.load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **model.hf_config,
        "dtype": "bfloat16",
    }


@pytest.mark.slow
def test_fp8_goes_out_and_comes_in(dslc: Run, run: Path, tmp_path: Path) -> None:
    assert dslc("export", run, "--to", "out", "--dtype", "fp8").status == 0
    # In two steps no norm has moved so far that BF16 could tell.
    outcome = dslc("import", "out", "--to", "in", "--first-values", "--format", "json")
    assert outcome.status == 0, outcome.err
    result = json.loads(outcome.out)
    assert result["ok"] and result["folder"] == "in"
    (row,) = (r for r in result["tensors"] if r["names"].endswith("experts.0..7.up_proj.weight"))
    assert (row["read"], row["written"], row["how"]) == ("F8_E4M3 + F32", "BF16", "dequantized")
    assert {t.dtype for t in state(tmp_path / "in").values()} == {torch.bfloat16, torch.float32}


@pytest.mark.slow
def test_weights_that_did_not_move(dslc: Run, tmp_path: Path) -> None:
    run = trained(tmp_path, "untrained_tiny", train__learning_rate="0", train__bias_update="0")
    outcome = dslc("export", run, "--to", "out")
    assert outcome.status == 1 and not (tmp_path / "out").exists()
    assert (
        "error[E610]: model.layers.{1..2}.mlp.experts.{0..7}.up_proj.weight (16): "
        "left at its initial values\n  = help: if it is meant to be so: --first-values"
    ) in outcome.err
    assert "model.norm.weight: left at its initial value, 1" in outcome.err
    assert "e_score_correction_bias (2): left at its initial value, 0" in outcome.err
    assert dslc("export", run, "--to", "out", "--first-values").status == 0


@pytest.mark.slow
def test_runs_that_cannot_be_exported(dslc: Run, tmp_path: Path) -> None:
    run = trained(tmp_path, "damaged_tiny")
    outcome = dslc("export", run, "--to", "out", "--ema")
    assert outcome.status == 1 and "E612" in outcome.err and "train.ema" in outcome.err
    file = next((newest(run) / "model").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = dslc("export", run, "--to", "out")
    assert outcome.status == 1 and "E612" in outcome.err and "is damaged" in outcome.err
    config = run / "damaged_tiny" / "config.py"
    config.write_text("import os\nHF_CONFIG = os.listdir()\n")
    (run / "run.json").write_text(json.dumps({"model": "../elsewhere", "seed": 1}))
    outcome = dslc("export", run, "--to", "out")
    assert outcome.status == 1 and "does not name model and seed" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_folders_that_cannot_be_read(dslc: Run, tmp_path: Path) -> None:
    assert "E100" in dslc("import", "nowhere", "--to", "out").err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "dslc"}')
    outcome = dslc("import", "other", "--to", "out")
    assert outcome.status == 1 and "E380" in outcome.err
    spec = ROOT / "specs" / "deepseek_v3_tiny.yaml"
    outcome = dslc("import", "other", "--to", "out", "--spec", spec)
    assert outcome.status == 1
    assert outcome.err == "error[E610]: other: the folder holds no *.safetensors file\n"
    save_file({"model.norm.weight": torch.rand(64)}, tmp_path / "other" / "model.safetensors")
    outcome = dslc("import", "other", "--to", "out", "--spec", spec)
    assert "error[E610]: model.layers.{1..4}.mlp.gate.weight (4): missing" in outcome.err
    assert "model.norm.weight" not in outcome.err
    outcome = dslc("import", "other", "--to", "other", "--spec", spec)
    assert outcome.status == 1 and "error[E611]: other exists" in outcome.err
    assert dslc("import", "other", "--to", "out", "--max-file", "0").status == 2
    config = hf_config(load(spec))
    for key in ("num_hidden_layers", "n_routed_experts"):
        text = json.dumps({**config, key: 10**6, "n_group": 1, "topk_group": 1})
        (tmp_path / "other" / "config.json").write_text(text)
        outcome = dslc("import", "other", "--to", "out")
        assert outcome.err == "error[E610]: the model has more than 200,000 weights\n"


def without(folder: str, name: str, *layers: int, **config: Any) -> str:
    """A copy of a folder without some layers, and with changes of its config.json."""
    Path(name).mkdir()
    gone = tuple(f".layers.{layer}." for layer in layers)
    tensors = state(Path(folder)).items()
    kept = {n: t for n, t in tensors if not any(part in n for part in gone)}
    save_file(kept, f"{name}/model.safetensors")
    text = json.loads(Path(folder, "config.json").read_text())
    Path(name, "config.json").write_text(json.dumps({**text, **config}))
    return name


@pytest.mark.slow
def test_an_mtp_module_that_was_declared_and_not_saved(dslc: Run, run: Path) -> None:
    """What transformers saves: `num_nextn_predict_layers: 1`, and no layer behind the last one."""
    assert dslc("export", run, "--to", "whole").status == 0
    config = json.loads(Path("whole/config.json").read_text())
    module = config["num_hidden_layers"]
    assert config["num_nextn_predict_layers"] == 1
    saved = without("whole", "saved", module)
    outcome = dslc("import", saved, "--to", "out", "--first-values")
    assert outcome.status == 0
    assert outcome.err == "dslc: saved declares MTP modules and holds no tensor of them: left out\n"
    assert json.loads(Path("out/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert state(Path("out")).keys() == state(Path(saved)).keys()
    # A file that cannot be read may have them, and another layer's absence is another matter.
    Path("saved/model-2.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    outcome = dslc("import", saved, "--to", "out2", "--first-values")
    assert outcome.status == 1 and "Git LFS" in outcome.err and "left out" not in outcome.err
    outcome = dslc("import", without("whole", "cut", 1, module), "--to", "out3", "--first-values")
    assert outcome.status == 1 and "model.layers.1.mlp.gate.weight: missing" in outcome.err


def test_an_mtp_module_of_a_spec_that_the_files_do_not_have(dslc: Run, run: Path) -> None:
    assert dslc("export", run, "--to", "whole").status == 0
    module = json.loads(Path("whole/config.json").read_text())["num_hidden_layers"]
    values = "".join(f"  {path}: {value}\n" for path, value in SETTINGS.items())
    Path("its.yaml").write_text(f"extends: {TINY}\nset:\n{values}")
    saved = without("whole", "saved", module)
    outcome = dslc("import", saved, "--to", "out", "--spec", "its.yaml")
    assert outcome.status == 1 and outcome.err.count("error[") == 1
    assert f"the MTP module (layer {module}) is declared" in outcome.err


@pytest.mark.slow
def test_the_language_model_of_a_larger_one_is_imported(dslc: Run, run: Path) -> None:
    """Its config in `text_config`, its weights under a prefix, and others beside them."""
    assert dslc("export", run, "--to", "whole").status == 0
    text = json.loads(Path("whole/config.json").read_text())
    dtype = text.pop("dtype")
    config = {"model_type": "llava", "text_config": text, "vision_config": {}, "dtype": dtype}
    Path("larger").mkdir()
    Path("larger/config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": one for name, one in state(Path("whole")).items()}
    vision = {"vision_tower.conv.weight": torch.ones(2), "model.norm.weight": torch.ones(3)}
    save_file({**tensors, **vision}, "larger/model.safetensors")
    outcome = dslc("import", "larger", "--to", "out", "--first-values")
    assert outcome.status == 0, outcome.err
    told = "dslc: larger has 2 tensors besides language_model.*, the model: left out\n"
    assert outcome.err == told
    whole, out = state(Path("whole")), state(Path("out"))
    assert whole.keys() == out.keys() and all(torch.equal(whole[n], out[n]) for n in out)
    assert json.loads(Path("out/config.json").read_text()) == {**text, "dtype": "bfloat16"}
    assert dslc("init", "--from-hf", "larger", "-o", "text.yaml").status == 0
    assert (
        dslc("import", "larger", "--to", "o2", "--first-values", "--spec", "text.yaml").status == 0
    )
    # What is missing of it is missing.
    del tensors["language_model.model.norm.weight"]
    save_file({**tensors, **vision}, "larger/model.safetensors")
    outcome = dslc("import", "larger", "--to", "o3", "--first-values")
    assert outcome.status == 1 and "error[E610]: model.norm.weight: missing\n" in outcome.err


def test_weights_in_float16_are_cast(dslc: Run, run: Path) -> None:
    assert dslc("export", run, "--to", "whole").status == 0
    half = without("whole", "half", dtype="float16")
    numbers = {name: tensor.half() for name, tensor in state(Path(half)).items()}
    save_file(numbers, f"{half}/model.safetensors")
    assert dslc("import", half, "--to", "out", "--first-values").status == 0
    for name, tensor in state(Path("out")).items():
        assert torch.equal(tensor, numbers[name].to(tensor.dtype))
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("command", ["import", "export"])
def test_without_torch_it_says_what_to_install(
    dslc: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = dslc(command, "folder", "--to", "out")
    assert outcome.status == 1
    assert "E605" in outcome.err and "pip install torch safetensors" in outcome.err


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    halfway = ConversionProgress(shard=3, shards=163, bytes=5 * 10**9, total=10**10, kept=10**9)
    line = "file 3 of 163, 5.00 of 10.00 GB, 1.00 GB from before, 100 MB/s, 0:00:50 left"
    assert progress_line(halfway, 40.0) == line
    ProgressPrinter(started=time.monotonic() - 40, printed=0.0, terminal=False)(halfway)
    assert capsys.readouterr().err == f"{line}\n"
    watched = ProgressPrinter(started=time.monotonic() - 40, printed=0.0, terminal=True)
    watched(halfway)
    watched(halfway)  # too soon
    watched.end()
    assert capsys.readouterr().err == f"\r{line:<79}\n"


# ---- all of V3's tensors --------------------------------------------------------------------

SMALL = {
    "hidden_size": 64, "vocab_size": 128, "q_lora_rank": 32, "kv_lora_rank": 32,
    "num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "moe_intermediate_size": 64,
}  # fmt: skip
SHARDS = 163


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names of DeepSeek-V3 in FP8, in as many files, each tensor small."""
    folder = tmp_path_factory.mktemp("v3") / "in"
    folder.mkdir()
    sets = [f"params.{name}={value}" for name, value in SMALL.items()]
    description = load(ROOT / "specs" / "deepseek_v3.yaml", sets=sets)
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = {**hf_config(description), "quantization_config": fp8}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    tensors = list(published(lower(description)))
    each = -(-len(tensors) // SHARDS)
    whole: dict[str, Tensor] = {}
    placed: dict[str, str] = {}
    for number in range(SHARDS):
        shard: dict[str, Tensor] = {}
        for one in tensors[number * each : (number + 1) * each]:
            value = torch.randn(one.shape, generator=generator)
            if one.copy_of:
                shard[one.name] = whole[one.copy_of].clone()
            elif one.fp8:
                shard[one.name] = value.to(torch.float8_e4m3fn)
                blocks = [-(-n // 128) for n in one.shape]
                scale = torch.rand(blocks, generator=generator)
                shard[f"{one.name}_scale_inv"] = scale
            else:
                shard[one.name] = value.to(torch.bfloat16 if one.trainable else torch.float32)
            if "layers" not in one.name:
                whole[one.name] = shard[one.name]
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(shard, folder / file)
        placed |= dict.fromkeys(shard, file)
    assert len(placed) == 91_991
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


# The last word of what it prints is the peak of its memory in KiB. Not `ru_maxrss`: that counts
# the pages of the process that it was forked from.
PEAK = """
import atexit, runpy
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
atexit.register(lambda: print(status()["VmHWM"].split()[0]))
runpy.run_module("dslc", run_name="__main__", alter_sys=True)
"""


def importing(source: Path, target: Path, program: str = "") -> subprocess.Popen[str]:
    words = ["import", str(source), "--to", str(target), "--max-file", "2500KB"]
    return subprocess.Popen(
        [sys.executable, *(["-c", program] if program else ["-m", "dslc"]), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_v3_is_imported_whole_however_often_it_is_killed(v3: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    for wanted in (1, 100):
        process = importing(v3, target)
        deadline = time.monotonic() + 300
        while len(list(partial.glob("records/*.json"))) < wanted:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not target.exists()
        kept = {p.name: p.stat().st_ino for p in partial.glob("model-*.safetensors")}
    process = importing(v3, target)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and not partial.exists()
    assert re.search(r"\.3\.\.61\.mlp\.experts\.0\.\.255\.up_proj\.weight +15,104 ", printed)
    files = {p.name: p for p in target.glob("model-*.safetensors")}
    done = [name for name in kept if files[name].stat().st_ino == kept[name]]
    assert len(done) >= 100 and len(files) > 150
    undisturbed = importing(v3, tmp_path / "whole", PEAK)
    printed, _ = undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0
    for path in (tmp_path / "whole").iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    # Python, torch and what is said of 92 thousand tensors: nothing that grows with their size.
    peak = int(printed.split()[-1]) * 1024
    print(f"peak of memory: {peak / 1e6:.0f} MB")
    assert peak < 900e6
    assert values(v3, target)


def values(v3: Path, target: Path) -> bool:
    """Some tensors by the definition of a weight with scales."""
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.60.mlp.experts.9.up_proj.weight"]
    ins: dict[str, Any] = json.loads((v3 / "model.safetensors.index.json").read_text())
    outs: dict[str, Any] = json.loads((target / "model.safetensors.index.json").read_text())
    for name in names:
        stored = {n: load_file(v3 / ins["weight_map"][n])[n] for n in (name, f"{name}_scale_inv")}
        found = load_file(target / outs["weight_map"][name])[name]
        scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = stored[name].float() * scale[: found.shape[0], : found.shape[1]]
        assert torch.equal(found, weight.bfloat16())
    return True
