"""Relatives: shipped specs have the published sizes, and imported models compute what transformers
does."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32

from compiler.analysis import summary
from compiler.lower import lower
from compiler.pipeline import PIPELINES, after
from dsl.hf import hf_config, spec_from_hf
from dsl.load import load
from dsl.source import Source
from dsl.units import format_count
from tests.support.command import Run
from tests.support.configs import Case
from tests.support.oracle import GRADIENTS, LOGITS, build_from_config, relative_rms
from tests.support.places import SPECS
from tests.support.reference import Reference

# ---- sizes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Relative:
    """A spec, the model of transformers, and the parameters that its authors state, in words of
    the model card: of all, and active ones."""

    spec: str
    model: str
    parameters: str
    active: str
    variant: tuple[str, ...] = ()


RELATIVES = [
    # arXiv 2502.16982, table 2, leaves embedding and head out: 15.29B and 2.24B.
    Relative("moonlight", "DeepseekV3", "15.96B", "2.91B"),
    Relative("kimi_k2", "DeepseekV3", "1.03T", "32.86B"),
    Relative("glm_4_7_flash", "Glm4MoeLite", "29.94B", "3.9B"),
    Relative("dots_llm1", "Dots1", "142.77B", "14.02B"),
    Relative("glm_4_5", "Glm4Moe", "352.8B", "33.63B"),
    Relative("glm_4_5", "Glm4Moe", "106.85B", "13.42B", ("air",)),
    Relative("deepseek_v32", "DeepseekV32", "671.88B", "38.4B"),
    Relative("minicpm3_4b", "MiniCPM3", "4.07B", "4.07B"),
    # 27B on average, embedding left out.
    Relative("longcat_flash", "LongcatFlash", "560.66B", "27.95B"),
    # transformers has no Ling of version 2.0; these are its equations under other names.
    Relative("ling_mini_2", "Glm4Moe", "16.26B", "1.43B"),
]


def config_of(relative: Relative) -> Any:
    """The config of transformers for a spec."""
    keys = hf_config(load(SPECS / f"{relative.spec}.yaml", variants=relative.variant))
    keys = {n: v for n, v in keys.items() if n not in ("model_type", "architectures")}
    return getattr(transformers, f"{relative.model}Config")(**keys, attn_implementation="eager")


@pytest.mark.parametrize("relative", RELATIVES, ids=lambda r: "_".join([r.spec, *r.variant]))
def test_a_spec_has_the_published_size(relative: Relative) -> None:
    description = load(SPECS / f"{relative.spec}.yaml", variants=relative.variant)
    decode = after(description, "decode", PIPELINES["decode"][-1].name)
    found = summary(lower(description), decode)
    assert format_count(found.parameters) == relative.parameters
    assert format_count(found.activated) == relative.active
    with torch.device("meta"):
        model = getattr(transformers, f"{relative.model}ForCausalLM")(config_of(relative))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    theirs = sum(t.numel() for n, t in tensors if not n.endswith(("inv_freq", "embed_scale")))
    assert found.parameters == theirs - unread(model.config)


def unread(config: Any) -> int:
    """Gate and up of LongCat's experts that compute nothing, which transformers makes, too."""
    zero = getattr(config, "zero_expert_num", 0)
    return (
        2 * zero * config.num_layers * config.moe_intermediate_size * config.hidden_size
        if zero
        else 0
    )


@pytest.mark.parametrize("relative", RELATIVES, ids=lambda r: "_".join([r.spec, *r.variant]))
def test_a_config_written_from_a_spec_gives_the_spec_again(
    relative: Relative, tmp_path: Path
) -> None:
    """So that what was imported can be exported, and imported again."""
    first = load(SPECS / f"{relative.spec}.yaml", variants=relative.variant)
    written = hf_config(first)
    assert written["model_type"] != "dslc"
    text = json.dumps(written)
    (tmp_path / "spec.yaml").write_text(spec_from_hf(written, Source("config.json", text), "again"))
    again = load(tmp_path / "spec.yaml")
    assert hf_config(again) == written
    one, other = (d.spec.architecture for d in (first, again))
    assert [g.slots["attention"].name for g in one.layers] == [
        g.slots["attention"].name for g in other.layers
    ]
    assert (one.mtp.depth, first.spec.sequence) == (other.mtp.depth, again.spec.sequence)


# ---- what they compute -----------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
FULL = ["full_attention"] * 2
# Moonlight and Kimi-K2 are deepseek_v3, whose every case is in test_parity.py.
CASES = [
    Case("dots", {**SMALL, **EXPERTS, **GROUPED, "sliding_window": None, "layer_types": FULL},
         "dots1"),
    Case("glm", {**SMALL, **EXPERTS, **GROUPED, "attention_bias": True, "use_qk_norm": True,
                 "rope_parameters": HALF, "num_nextn_predict_layers": 1}, "glm4_moe"),
    Case("glm_lite", {**SMALL, **EXPERTS, **LATENT}, "glm4_moe_lite"),
    # With few heads index scores may be equal, 0, of which torch.topk takes any.
    Case("v32", {**SMALL, **EXPERTS, **LATENT, "index_n_heads": 12, "index_head_dim": 12,
                 "index_topk": 5, "rope_parameters": YARN}, "deepseek_v32"),
    Case("minicpm", {**SMALL, **LATENT, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16},
         "minicpm3"),
    Case("longcat", {**SMALL, **LATENT, "num_hidden_layers": 4, "ffn_hidden_size": 56,
                     "moe_topk": 4, "n_routed_experts": 6, "zero_expert_num": 3,
                     "expert_ffn_hidden_size": 24, "head_dim": 8, "routed_scaling_factor": 1.8},
         "longcat_flash"),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reference, Any]:
    """The model of transformers, and the same one imported from what transformers saves of it."""
    case: Case = request.param
    checkpoint = tmp_path_factory.mktemp(case.name) / "checkpoint"
    reference = Reference(case, zlib.crc32(case.name.encode()))
    reference.save(checkpoint)
    model = build_from_config(checkpoint / "config.json", f"relative_{case.name}").Model()
    model.load(checkpoint)
    return reference, model


def tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(96, (2, 21), generator=torch.manual_seed(0))
    return text[:, :-1], text[:, 1:]


def parts_of(model: Any) -> Any:
    """Its tensors by published name."""
    return sys.modules[f"{type(model).__module__.split('.')[0]}.runtime.weights"].published(model)


def test_an_imported_model_computes_what_transformers_does(pair: tuple[Reference, Any]) -> None:
    reference, model = pair
    text, _ = tokens()
    main, later = reference.logits(text)
    found = model(text)
    for mine, other in zip([found.logits, *found.mtp_logits], [main, *later], strict=True):
        assert relative_rms(mine, other) <= LOGITS
    prompt = text[:, :9]
    theirs = reference.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert model.generate(prompt, max_new_tokens=12, temperature=0).tolist() == theirs.tolist()


def test_its_gradients_are_those_of_transformers(pair: tuple[Reference, Any]) -> None:
    """Of the weights that the loss of the text reaches: an indexer has a loss of its own."""
    reference, model = pair
    text, labels = tokens()
    for _, module in reference.modules():
        module.zero_grad()
    main, later = reference.losses(text, labels)
    sum(later, main).backward()
    theirs = {n: g for n, g in reference.published(grad=True).items() if g.numel()}
    model.zero_grad()
    loss = model.loss(text, labels)
    assert loss.main.item() == pytest.approx(main.item(), rel=1e-5)
    sum(loss.mtp, loss.main).backward()
    mine = {part.name: part.grad for part in parts_of(model) if part.grad is not None}
    errors = {name: relative_rms(mine[name], gradient) for name, gradient in theirs.items()}
    assert max(errors.values()) <= GRADIENTS, errors
    assert {n for n in mine if n not in theirs and mine[n].count_nonzero()} == set()


# ---- what transformers saves -----------------------------------------------------------------


AGAIN = [case for case in CASES if case.name in ("glm", "longcat")]  # the others are no different


@pytest.mark.parametrize("case", AGAIN, ids=lambda case: case.name)
def test_what_transformers_saves_again_is_imported_byte_by_byte(
    case: Case, dslc: Run, tmp_path: Path
) -> None:
    """In BF16, as people keep models; what transformers keeps in float32 it keeps there."""
    reference = Reference(case, 1)
    reference.model.save_pretrained("first")
    type(reference.model).from_pretrained("first", dtype=torch.bfloat16).save_pretrained("saved")
    saved = load_file("saved/model.safetensors")
    outcome = dslc("import", "saved", "--to", "in")
    assert outcome.status == 0, outcome.err
    unread = {name for name in saved if re.search(r"experts\.[678]\.(gate|up)_proj", name)}
    unread &= {name for name in saved if case.name == "longcat"}
    assert ("12 tensors of experts that compute nothing: left out" in outcome.err) == bool(unread)
    imported = load_file("in/model.safetensors")
    assert imported.keys() == saved.keys() - unread
    for name, tensor in imported.items():
        # transformers widens the weight of LongCat's router, dslc its bias: BF16's values still.
        assert tensor.dtype == saved[name].dtype or ".router." in name
        assert torch.equal(tensor.float(), saved[name].float()), name
    assert dslc("export", "in", "--to", "out").status == 0
    assert Path("out/model.safetensors").read_bytes() == Path("in/model.safetensors").read_bytes()
    assert Path("out/config.json").read_bytes() == Path("in/config.json").read_bytes()


# ---- the indexer of DeepSeek-V3.2 ------------------------------------------------------------


@pytest.mark.parametrize("pair", [c for c in CASES if c.name == "v32"], indirect=True, ids=["v32"])
def test_an_indexer_learns_what_attention_looks_at(pair: tuple[Reference, Any]) -> None:
    """The gradient of KL(p || softmax(I)), by transformers' modules, and of nothing else."""
    reference, model = pair
    text, labels = tokens()
    expected = sum(index_losses(reference, text))
    reference.model.zero_grad()
    expected.backward()
    theirs = {n: g for n, g in reference.published(grad=True).items()}
    model.zero_grad()
    loss = model.loss(text, labels)
    assert (loss.total - loss.main).item() == pytest.approx(expected.item(), rel=1e-4)
    loss.total.backward()
    mine = {part.name: part.grad for part in parts_of(model) if ".indexer." in part.name}
    assert len(mine) == 2 * 5
    for name, gradient in mine.items():
        assert relative_rms(gradient, theirs[name]) <= GRADIENTS, name


def index_losses(reference: Reference, text: Tensor) -> Iterator[Tensor]:
    """Of each layer, from what transformers' attention and indexer are given and give."""
    seen: dict[int, dict[str, Any]] = {}
    for i, layer in enumerate(reference.model.model.layers):
        notes = seen.setdefault(i, {})
        layer.self_attn.register_forward_hook(
            lambda m, args, out, notes=notes: notes.update(probability=out[1])
        )
        layer.self_attn.indexer.register_forward_hook(
            lambda m, args, out, notes=notes: notes.update(given=args, selected=out)
        )
    with torch.no_grad():
        reference.model(text)
    for i, notes in seen.items():
        indexer = reference.model.model.layers[i].self_attn.indexer
        hidden, queries, table = notes["given"][:3]
        q = indexer.wq_b(queries).unflatten(-1, (indexer.n_heads, -1))
        k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
        rope = indexer.qk_rope_head_dim
        q_turned, k_turned = v32.apply_rotary_pos_emb(
            q[..., :rope], k[..., :rope], *table, unsqueeze_dim=2
        )
        q, k = torch.cat([q_turned, q[..., rope:]], -1), torch.cat([k_turned, k[..., rope:]], -1)
        score = torch.einsum("bqhd,bkd->bqhk", q, k[:, :, 0]).relu() * indexer.softmax_scale
        weight = indexer.weights_proj(hidden) * indexer.n_heads**-0.5
        score = torch.einsum("bqhk,bqh->bqk", score, weight)
        p = notes["probability"].mean(1)
        log_q = score.masked_fill(p == 0, -torch.inf).log_softmax(-1)
        gap = p.clamp(min=1e-30).log() - log_q.masked_fill(p == 0, 0)
        yield (p * gap).sum(-1).mean()
