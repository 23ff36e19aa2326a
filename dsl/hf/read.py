"""A `config.json` of the DeepSeek V2/V3 family, read into a spec.

What decides the numbers of the model is taken over exactly; what the spec cannot say is refused by
name. The meaning of a key is that of transformers 5.23.0, which loads the same file; where older
code of the model's authors disagrees with it, the file is refused and not interpreted.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dsl.diagnostic import Diagnostics
from dsl.hf.config_file import MAX_NUMBER, Reader, shown, spans_of
from dsl.hf.families import V2, V3, Family, Layers
from dsl.hf.keys import (
    ARCHITECTURES,
    ATTENTIONS,
    EXPERT_KEYS,
    FAMILIES,
    FIXED,
    FP8_BLOCKS,
    GENERATION,
    IGNORED,
    KEPT,
    LONGCAT,
    PART,
    POLICIES,
    RELATIVES,
    language_model,
    model_type,
)
from dsl.hf.longcat import LongCat
from dsl.hf.rope import rope_params
from dsl.source import Source


def spec_from_hf(config: Mapping[str, Any], source: Source, name: str) -> str:
    """The text of a spec that describes the model of a `config.json`.

    Of a model of several parts it is the language model, as `language_model` gives it. `source` is
    the text that `config` was read from (by `read_config`), so that messages can point into it;
    `name` becomes the spec's `model`. Raises DiagnosticError naming every key that a spec
    cannot express, that is missing, or that has a wrong type.
    """
    problems = Diagnostics()
    part = language_model(config)
    reader = Reader(part, spans_of(source), problems, () if part is config else (PART,))
    if not (name.isascii() and name.isidentifier()):
        help = "letters, digits and `_`, for example `my_model`"
        problems.error("E384", f"`{name}` cannot name a model", help=help)
    family = _family(reader)
    if family is None:
        problems.raise_if_any()
    assert family is not None
    reader.taken |= IGNORED
    for key, (value, why) in FIXED.items():
        reader.only(key, [value], why)
    layers = family.layers(reader)
    params = _params(reader, family, layers)
    sequence, train, precision = _sequence(reader), _train(reader), _precision(reader)
    generation = _generation(reader)
    reader.finish()
    problems.raise_if_any()
    origin = f"a config.json of {model_type(part)}"
    if part is not config:
        origin = f"the `{PART}` of a config.json, {model_type(part)}"
    about = f"{layers.dense + layers.sparse} layers, from {origin}"
    attention, file = ATTENTIONS.get(str(model_type(part)), ("MLA", "mla"))
    sections = [
        [
            f"model: {name}",
            f"about: {about}",
            f"blocks: [{', '.join(family.blocks(layers, file))}]",
        ],
        ["params:", *_titled(params)],
        family.architecture(layers, attention),
        ["sequence:", *(f"  {key}: {_yaml(value)}" for key, value in sequence.items())],
        precision,
        train,
        generation,
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _family(reader: Reader) -> Family | None:
    """That of the model; None for a model of another kind, which is refused."""
    kind = str(model_type(reader.config))
    key = "model_type" if reader.config.get("model_type") else "architectures"
    help = f"known are {', '.join(FAMILIES)}"
    if kind in RELATIVES:
        message = f"`{kind}` is another model: {RELATIVES[kind]}"
        reader.refuse(key, message, help, "E380")
        return V3()
    if kind not in FAMILIES:
        message = f"{shown(model_type(reader.config))} is no model of the DeepSeek V2/V3 family"
        reader.refuse(key, message, help, "E380")
        return None
    names = reader.config.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if str(name) not in ARCHITECTURES:
            message = f"the architecture {shown(name)} is not the language model itself"
            reader.refuse("architectures", message, f"known are {', '.join(ARCHITECTURES)}", "E380")
    return {"v3": V3, "v2": V2, LONGCAT: LongCat}[FAMILIES[kind]]()


def _params(reader: Reader, family: Family, layers: Layers) -> dict[str, dict[str, Any]]:
    """Parameters under the heading that the spec gives them."""
    main = {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
    }
    if model_type(reader.config) == "minicpm3":
        main |= _scales(reader, layers.dense)
    main |= family.dense_params(reader, layers)
    first = reader.flag("mtp_hidden_states_first", False)
    normed = reader.flag("tie_last_hidden_states", True)
    if not normed and layers.mtp > 1:
        message = "only the first MTP module would get a state that is not normed"
        reader.refuse("tie_last_hidden_states", message)
    mtp = {
        "mtp_concat": "hidden_first" if first else "embedding_first",
        "mtp_hidden_state": "after_norm" if normed else "before_norm",
    }
    if not layers.has_experts:
        reader.taken |= EXPERT_KEYS  # which a model without a mixture may have or leave out
    sections: dict[str, dict[str, Any]] = {
        "the model": main,
        "attention": _attention(reader, family),
        "rotary embedding": rope_params(reader),
        "experts": family.expert_params(reader) if layers.has_experts else {},
        "prediction of further tokens": mtp if layers.mtp else {},
    }
    return {title: params for title, params in sections.items() if params}


def _scales(reader: Reader, layers: int) -> dict[str, float]:
    """What MiniCPM multiplies embeddings and branches by, and divides states by before the head."""
    hidden = reader.integer("hidden_size")
    base = reader.integer("dim_model_base", hidden)
    return {
        "embedding_multiplier": reader.number("scale_emb", 12),
        "residual_multiplier": reader.number("scale_depth", 1.4) / math.sqrt(layers),
        "logits_scaling": hidden / base,
    }


def _attention(reader: Reader, family: Family) -> dict[str, int | float | bool]:
    kind = str(model_type(reader.config))
    if ATTENTIONS.get(kind, ("",))[0] == "NormedGQA":
        return _grouped(reader, kind)
    reader.only("partial_rotary_factor", [1], "all of qk_rope_head_dim is rotated")
    params = _latent(reader)
    if kind == "deepseek_v32":
        if not params["q_lora_rank"]:
            message = "the indexer of DeepSeek-V3.2 reads compressed queries"
            reader.refuse("q_lora_rank", message, "give the rank that they are compressed to")
        _only_kind_of_layer(reader, "indexed_attention")
        names = ("index_n_heads", "index_head_dim", "index_topk")
        params |= {name: reader.integer(name) for name in names}
        params["indexer_loss_weight"] = 1.0  # of training, of which the config says nothing
    if kind == "minicpm3":
        params |= {"rope_halves": True}
    return params | family.latent_params(reader, params["q_lora_rank"])


def _grouped(reader: Reader, kind: str) -> dict[str, int | float | bool]:
    """Grouped-query attention of dots.llm1 and GLM-4.5."""
    heads, hidden = reader.integer("num_attention_heads"), reader.integer("hidden_size")
    reader.only("sliding_window", [None], "attention is to all tokens before")
    reader.only("use_sliding_window", [False], "attention is to all tokens before")
    _only_kind_of_layer(reader, "full_attention")
    reader.taken.add("max_window_layers")  # of a window that there is not
    params: dict[str, int | float | bool] = {
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("num_key_value_heads", heads),
        "head_dim": reader.integer("head_dim", max(hidden // heads, 1)),
    }
    if reader.flag("attention_bias", False):
        if kind == "dots1":
            message = "transformers gives dots.llm1 a bias of o_proj, too"
            reader.refuse("attention_bias", message)
        params["attention_bias"] = True
    if kind == "glm4_moe" and not reader.flag("use_qk_norm", False):
        params["use_qk_norm"] = False
    inner = (reader.config.get("rope_parameters") or {}).get("partial_rotary_factor")
    part = reader.number("partial_rotary_factor", 0.5 if kind == "glm4_moe" else 1)
    if inner is not None or part != 1:
        params["partial_rotary_factor"] = part if inner is None else inner
    return params


def _only_kind_of_layer(reader: Reader, kind: str) -> None:
    """`layer_types` has the one kind that the blocks of this family compute."""
    kinds = reader.take("layer_types")
    if kinds is not None and kinds != [kind] * reader.integer("num_hidden_layers"):
        reader.refuse("layer_types", f"`layer_types` is {kind} for each layer, or absent")


def _latent(reader: Reader) -> dict[str, int | float | bool]:
    heads = reader.integer("num_attention_heads")
    nope, rope = reader.integer("qk_nope_head_dim"), reader.integer("qk_rope_head_dim")
    reader.only("num_key_value_heads", [heads], "every query head has its own key and value")
    reader.only("qk_head_dim", [nope + rope], "it is qk_nope_head_dim + qk_rope_head_dim")
    reader.only("head_dim", [rope, nope + rope], "it follows from the other head sizes")
    return {
        "num_attention_heads": heads,
        "q_lora_rank": _q_lora_rank(reader),
        "kv_lora_rank": reader.integer("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": reader.integer("v_head_dim"),
        **({"attention_bias": True} if reader.flag("attention_bias", False) else {}),
    }


def _q_lora_rank(reader: Reader) -> int:
    """null, no compression, is 0 in a spec."""
    if reader.take("q_lora_rank") == 0:
        message = "`q_lora_rank: 0` is a projection of width zero in transformers"
        reader.refuse("q_lora_rank", message, "write null if queries are not compressed")
    return reader.integer("q_lora_rank", 0, minimum=0)


def _sequence(reader: Reader) -> dict[str, int | list[int]]:
    sequence: dict[str, int | list[int]] = {
        "max_position_embeddings": reader.integer("max_position_embeddings")
    }
    if reader.take("bos_token_id") is not None:
        sequence["bos_token_id"] = reader.integer("bos_token_id", minimum=0)
    if reader.take("eos_token_id") is not None:
        sequence["eos_token_id"] = _end_tokens(reader)
    return sequence


def _end_tokens(reader: Reader) -> int | list[int]:
    """The token that ends a text, or several that do, as the file has it."""
    tokens = reader.take("eos_token_id")
    if not isinstance(tokens, list):
        return reader.integer("eos_token_id", minimum=0)
    if not tokens or not all(type(token) is int and 0 <= token <= MAX_NUMBER for token in tokens):
        message = f"`eos_token_id` must be token ids from 0, not {shown(tokens)}"
        reader.refuse("eos_token_id", message)
        return 0
    return list(dict.fromkeys(tokens))


def _train(reader: Reader) -> list[str]:
    lines = []
    if reader.take("initializer_range") is not None:
        lines.append(f"  initializer_range: {_yaml(reader.number('initializer_range'))}")
    alpha = reader.number("aux_loss_alpha", 0)
    if alpha:
        reader.only("seq_aux", [True], "experts are balanced within each sequence")
    # Also a weight of 0 is said: left out, it would be a loss that nobody decided on.
    lines.append(f"  loss: {{balance_alpha: {_yaml(alpha)}}}")
    reader.taken.add("seq_aux")
    return ["train:", *lines]


def _precision(reader: Reader) -> list[str]:
    """The line of the section: element type, `dtype` or in older files `torch_dtype`, and scales.

    FP8 is in blocks of 128 x 128, which is multiplied out when weights are loaded; no other.
    """
    key = "dtype" if reader.config.get("dtype") else "torch_dtype"
    dtype = reader.only(key, list(POLICIES), "weights are kept in one of these")
    quantized = reader.sub("quantization_config")
    if quantized.config:
        for name, value in FP8_BLOCKS.items():
            quantized.only(name, [value], "weights that can be read are FP8 in blocks of 128 x 128")
    # `dslc import` writes it beside weights in BF16, which have no quantization_config.
    powers = [one.only("scale_fmt", [None, "ue8m0"], "scales are any number, or powers of two")
              for one in (quantized, reader)]  # fmt: skip
    scales = ", scale_format: ue8m0" if any(powers) else ""
    lines = [f"precision: {{policy: {POLICIES[dtype]}{scales}}}"]
    for one in (quantized, reader):
        kept = one.take(KEPT, [])
        if not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
            one.refuse(KEPT, f"`{KEPT}` must be a list of names, not {shown(kept)}")
        elif kept:
            lines.insert(
                0, f"# FP8 files keep {len(kept)} modules in BF16: see precision.overrides."
            )
    if dtype == "float16":
        lines.insert(
            0, "# float16 in the config.json; `dslc import` rounds the weights to bfloat16."
        )
    return lines


def _generation(reader: Reader) -> list[str]:
    """A comment on settings of generation that the file changes, which are no part of a model."""
    changed = []
    for key, default in GENERATION.items():
        value = reader.take(key)
        if value is not None and value != default:
            # Of text a stranger could end the comment by.
            changed.append(f"{key} {value}" if isinstance(value, int | float) else key)
    remark = "# The config.json has settings of generation, which specs have no keys for: "
    text = remark + ", ".join(changed)
    return textwrap.wrap(text, 100, subsequent_indent="# ") if changed else []


def _titled(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for title, params in sections.items():
        yield f"  # {title}"
        yield from (f"  {key}: {_yaml(value)}" for key, value in params.items())


def _yaml(value: int | float | bool | str | list[int]) -> str:
    """A value as specs write it: 1e-6, true, "text", [1, 2]."""
    if isinstance(value, bool | str | list):
        return json.dumps(value)
    return re.sub(r"e([+-])0*", lambda m: "e-" if m[1] == "-" else "e", repr(value))
