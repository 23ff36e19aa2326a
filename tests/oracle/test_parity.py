"""Built models compute what transformers computes: float32, on the CPU, with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from tests.support.oracle import GRADIENTS, LOGITS, Pair, relative_rms


def test_weights_have_the_published_names(pair: Pair) -> None:
    ours = pair.model.state_dict()
    theirs = {n: t for n, t in pair.reference.published().items() if t.numel()}
    assert set(ours) - set(pair.model.aliases) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_logits(pair: Pair) -> None:
    with torch.no_grad():
        theirs, _ = pair.reference.logits(pair.tokens)
        assert relative_rms(pair.model(pair.tokens).logits, theirs) <= LOGITS


def test_mtp_logits(pair: Pair) -> None:
    with torch.no_grad():
        _, theirs = pair.reference.logits(pair.tokens)
        ours = pair.model(pair.tokens).mtp_logits
    assert [list(t.shape) for t in ours] == [list(t.shape) for t in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_rms(mine, other) <= LOGITS


def test_losses(pair: Pair) -> None:
    with torch.no_grad():
        main, later = pair.reference.losses(pair.tokens, pair.labels)
        ours = pair.model.loss(pair.tokens, pair.labels)
    assert ours.main.item() == pytest.approx(main.item(), rel=1e-5)
    assert [t.item() for t in ours.mtp] == pytest.approx([t.item() for t in later], rel=1e-5)
    balance = pair.reference.balance(pair.tokens)
    assert ours.balance.item() == pytest.approx(balance, rel=1e-5)
    weight, alpha = 0.3, pair.case.config["aux_loss_alpha"]
    total = main.item() + alpha * balance
    total += weight * sum(t.item() for t in later) / max(len(later), 1)
    assert ours.total.item() == pytest.approx(total, rel=1e-5)


def test_expert_load_counts_every_choice(pair: Pair) -> None:
    config, depth = pair.case.config, pair.case.depth
    load = pair.model.loss(pair.tokens, pair.labels).load
    # One row for each gate: groups of layers come as matrices, MTP modules as vectors behind them.
    rows = [row for part in load for row in part.view(-1, config["n_routed_experts"])]
    gates = sum(name.endswith("mlp.gate.weight") for name in pair.model.state_dict())
    batch, length = pair.tokens.shape
    # A module of depth k sees k tokens less.
    lengths = [length] * (gates - depth) + [length - k for k in range(1, depth + 1)]
    choices = [batch * seen * config["num_experts_per_tok"] for seen in lengths]
    assert [row.sum().item() for row in rows] == choices


def test_gradients(pair: Pair) -> None:
    main, later = pair.reference.losses(pair.tokens, pair.labels)
    for _, module in pair.reference.modules():
        module.zero_grad()
    sum(later, main).backward()
    theirs = {n: g for n, g in pair.reference.published(grad=True).items() if g.numel()}
    ours = pair.model.loss(pair.tokens, pair.labels)
    pair.model.zero_grad()
    sum(ours.mtp, ours.main).backward()
    parts = {part.name: part for part in pair.member("runtime.weights.published")(pair.model)}
    learned = {name for name, part in parts.items() if part.storage.requires_grad}
    assert learned == set(theirs)
    wrong = {}
    for name, gradient in theirs.items():
        error = relative_rms(parts[name].grad, gradient)
        if error > GRADIENTS:
            wrong[name] = error
    assert not wrong


def test_greedy_tokens(pair: Pair) -> None:
    prompt = pair.tokens[:, :9]
    theirs = pair.reference.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),  # or it would take token 0 for padding
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=0,
    )
    ours = pair.model.generate(prompt, max_new_tokens=64, temperature=0)
    assert ours.tolist() == theirs.tolist()


def test_cached_decoding_equals_the_full_forward(pair: Pair) -> None:
    """A prompt of 7 tokens, 5 more at once, and the rest one by one."""
    batch, length = pair.tokens.shape
    ends = [7, 12, *range(13, length + 1)]
    cache = pair.member("runtime.cache.Cache")(batch, length)
    with torch.no_grad():
        full = pair.model(pair.tokens).logits
        for start, end in zip([0, *ends], ends, strict=False):
            position = torch.arange(start, end).expand(batch, -1)
            last = pair.model.decode(pair.tokens[:, start:end], position, cache)
            assert relative_rms(last, full[:, end - 1]) <= LOGITS


def test_the_cache_holds_latents_and_rope_keys_only(pair: Pair) -> None:
    batch, length = pair.tokens.shape
    cache = pair.member("runtime.cache.Cache")(batch, length)
    with torch.no_grad():
        pair.model.decode(pair.tokens, torch.arange(length).expand(batch, -1), cache)
    keys = pair.case.config
    a_token = keys["num_hidden_layers"] * (keys["kv_lora_rank"] + keys["qk_rope_head_dim"]) * 4
    assert cache.bytes == batch * length * a_token


def test_transformers_loads_what_was_saved(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    pair.model.save(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert type(model) is type(pair.reference.model)
    # transformers makes shared experts of width zero where there are none, and never MTP modules.
    state = model.state_dict()
    assert all(state[name].numel() == 0 for name in info["missing_keys"])
    mtp = tuple(prefix for prefix, _ in pair.reference.modules() if prefix)
    assert all(name.startswith(mtp) for name in info["unexpected_keys"])
    assert not info["mismatched_keys"] and not info["error_msgs"]
    with torch.no_grad():
        theirs, _ = pair.reference.logits(pair.tokens)
        assert relative_rms(model(pair.tokens).logits, theirs) <= LOGITS
    if not mtp:
        return
    # MtpModel looks for its weights where the model says that it leaves some out.
    model._keys_to_ignore_on_load_unexpected = [prefix.replace(".", r"\.") for prefix in mtp]
    pair_of_modules = MtpModel.from_pretrained(model), pair.reference.mtp
    loaded, original = (dict(m.named_parameters()) for m in pair_of_modules)
    assert loaded.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(loaded[name], tensor), name
