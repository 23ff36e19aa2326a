"""The trainer of a build against a plain loop over the model of transformers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.build import build
from dsl.hf import read_config, spec_from_hf
from dsl.load import load
from dsl.source import Source
from tests.support.configs import YARN, Case
from tests.support.oracle import import_package
from tests.support.places import TEXT
from tests.support.reference import Reference

CASE = Case("training", {"aux_loss_alpha": 0.0, "rope_scaling": YARN})
STEPS, BATCH, LENGTH, RATE = 20, 6, 32, 1e-3
SETS = [
    "precision.policy=fp32",
    f"train.sequence_length={LENGTH}",
    f"train.batch={BATCH}",
    "train.micro_batch=4",
    f"train.steps={STEPS}",
    f"train.learning_rate=[{{until_step: 10, start: 0, value: {RATE}}}, {{value: {RATE}}}]",
    "train.bias_update=0",  # transformers leaves the bias alone
]


def trainer(reference: Reference, folder: Path) -> Any:
    reference.save(folder / "checkpoint")
    config = folder / "checkpoint" / "config.json"
    source = Source(str(config), config.read_text())
    (folder / "spec.yaml").write_text(spec_from_hf(read_config(source), source, "oracle_training"))
    build(load(folder / "spec.yaml", sets=SETS), folder / "oracle_training")
    package = import_package(folder / "oracle_training", "oracle_training")
    model = package.Model()
    model.load(folder / "checkpoint")
    inside = "oracle_training.runtime.train"
    settings = importlib.import_module(f"{inside}.settings").Settings.of(package.config)
    text = torch.tensor(list(TEXT.read_bytes()[:4000])) % 96
    sequences = importlib.import_module(f"{inside}.sequences").Sequences([text], LENGTH, 0)
    return importlib.import_module(f"{inside}.trainer").Trainer(model, settings, sequences)


def test_twenty_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    reference = Reference(CASE, seed=5)
    ours = trainer(reference, tmp_path)
    theirs = reference.model.train()
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(STEPS):
        tokens = torch.stack([ours.sequences[BATCH * step + i] for i in range(BATCH)])
        logits = theirs(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10)
        optimizer.step()
        losses.append(loss.item())
    found = [ours.step().main for _ in range(STEPS)]
    assert found == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.1
