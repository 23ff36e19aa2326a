"""Whether packages built now compute the same bits as packages built by another commit.

Every shipped spec is built twice, by the working tree and by BASE, both load the same weights, and
both compute scores, losses, gradients, a text by greedy decoding, and three steps of an optimizer
with the losses after each. Large models are cut to a size that two cores can run; their structure,
precision and layer kinds stay. Run it from the repository's root:

    python benchmarks/same_numbers.py --base COMMIT [SPEC ...]

Prints a row for each spec; the exit status is 1 if any bit differs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
SMALL = {
    "params.vocab_size": "512",
    "params.hidden_size": "256",
    "params.num_attention_heads": "4",
    "params.kv_lora_rank": "128",
    "params.qk_nope_head_dim": "64",
    "params.v_head_dim": "64",
    "params.n_routed_experts": "32",
    "params.moe_intermediate_size": "128",
    "architecture.layers.0.feed_forward": "SwiGLU(intermediate_size=384)",
    "architecture.layers.1.repeat": "2",
}
ONE_RANK = {
    "parallel.cluster": "cpu_2x2",
    "parallel.pipeline": "1",
    "parallel.expert": "1",
    "parallel.schedule": "1f1b",
    "parallel.batch": "16",
    "parallel.sequence_length": "64",
}
# What each shipped spec is cut to; a spec that is not named is built as it is.
CUTS = {
    "deepseek_v3": {**SMALL, **ONE_RANK, "params.q_lora_rank": "192"},
    "deepseek_v2_236b": {**SMALL, "params.q_lora_rank": "192"},
    "deepseek_v2_lite": SMALL,
}
BATCH, LENGTH, NEW_TOKENS, STEPS = 2, 40, 12, 3


@dataclass(frozen=True)
class Comparison:
    """One spec: how many tensors were compared, and the names of those that differ."""

    spec: str
    compared: int
    different: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("specs", nargs="*", help="names of shipped specs; all of them by default")
    parser.add_argument("--base", required=True, help="the commit to compare with")
    parser.add_argument(
        "--compute", nargs=3, metavar=("FOLDER", "WEIGHTS", "OUT"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.compute:
        compute(*map(Path, arguments.compute))
        return 0
    names = arguments.specs or sorted(path.stem for path in (ROOT / "specs").glob("*.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tree = work / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), arguments.base], check=True)
        try:
            found = [compare(name, tree, work / name, arguments.base) for name in names]
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    print(f"{'spec':20} {'tensors':>8}  compared with {arguments.base}")
    for one in found:
        state = f"different: {', '.join(one.different)}" if one.different else "equal bits"
        print(f"{one.spec:20} {one.compared:8}  {state}")
    return int(any(one.different for one in found))


def compare(spec: str, tree: Path, work: Path, base: str) -> Comparison:
    """Builds a spec with both commits and compares what the packages compute."""
    results: dict[str, dict[str, Tensor]] = {}
    weights = work / "weights.safetensors"
    for side, source in (("then", tree), ("now", ROOT)):
        package = work / side / "model"
        cuts = [f for key, value in CUTS.get(spec, {}).items() for f in ("--set", f"{key}={value}")]
        build = ["build", f"specs/{spec}.yaml", "-o", str(package), *cuts]
        run([sys.executable, "-m", "dslc", *build], source)
        out = work / f"{side}.safetensors"
        program = [sys.executable, str(Path(__file__).resolve()), "--base", base]
        run([*program, "--compute", str(package), str(weights), str(out)], work)
        results[side] = load_file(out)
    then, now = results["then"], results["now"]
    different = [
        name
        for name in sorted(then.keys() | now.keys())
        if name not in then or name not in now or not same_bits(then[name], now[name])
    ]
    return Comparison(spec, len(then), tuple(different))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {folder}:\n{done.stdout}{done.stderr}")


def compute(package: Path, weights: Path, out: Path) -> None:
    """What the package in a folder computes; the first one to come draws the weights."""
    sys.path.insert(0, str(package.parent))
    torch.manual_seed(0)
    torch.set_num_threads(2)
    built = importlib.import_module(package.name)
    model = built.Model(device="cpu", seed=0)
    if not weights.exists():
        # A bias that differs from 0 and norms that differ from 1 take part in the comparison.
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor += (0.02 * torch.randn(tensor.shape)).to(tensor.dtype)
        state = model.state_dict()
        save_file({name: value.clone().contiguous() for name, value in state.items()}, weights)
    model.load_state_dict(load_file(weights))
    vocab = built.config.params.vocab_size
    text = torch.randint(vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels = text[:, :-1], text[:, 1:]
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        scores = model(tokens)
    found["logits"] = scores.logits
    found |= {f"mtp_logits.{i}": x for i, x in enumerate(scores.mtp_logits)}
    with torch.no_grad():
        found["generated"] = model.generate(tokens[:, :9], max_new_tokens=NEW_TOKENS, temperature=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        loss = model.loss(tokens, labels, tokens_seen=step)
        optimizer.zero_grad()
        loss.total.backward()
        found |= {f"{name}.{step}": part for name, part in terms(loss).items()}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                found[f"gradient.{step}.{name}"] = weight.grad.clone()
        optimizer.step()
    found |= {f"weight.{name}": value for name, value in model.state_dict().items()}
    save_file({name: value.detach().clone().contiguous() for name, value in found.items()}, out)


def terms(loss: object) -> dict[str, Tensor]:
    """The tensors of a `Loss`, those of tuples numbered."""
    found: dict[str, Tensor] = {}
    for name in ("total", "main", "mtp", "balance", "load"):
        value = getattr(loss, name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"loss.{name}.{i}": part for i, part in enumerate(parts)}
    return found


if __name__ == "__main__":
    sys.exit(main())
