"""The generated files of the models whose text is compared."""

from __future__ import annotations

from backends.build import package
from compiler.analysis import summary
from compiler.pipeline import Compiled, compile
from compiler.plan.make import make_plan
from dsl.load import Description, load
from tests.support.places import SPECS

SMALL = [
    "params={vocab_size: 32, hidden_size: 8, num_attention_heads: 2, num_key_value_heads: 1, "
    "head_dim: 4, intermediate_size: 8, tie_word_embeddings: true}",
    "blocks=[causal_lm, decoder, gqa, swiglu]",
    "architecture={layers: [{repeat: 2, attention: GQA, feed_forward: SwiGLU}]}",
    "train={}",
]
CASES: dict[str, tuple[str, list[str]]] = {
    "deepseek_v3": ("deepseek_v3", []),
    "deepseek_v3_tiny": ("deepseek_v3_tiny", []),
    "deepseek_v2_lite": ("deepseek_v2_lite", []),
    "dense_gqa_tied": ("deepseek_v3_tiny", SMALL),
}


def described(case: str) -> tuple[Description, Compiled]:
    spec, sets = CASES[case]
    description = load(SPECS / f"{spec}.yaml", sets=sets)
    return description, compile(description)


def generated(case: str) -> dict[str, str]:
    description, compiled = described(case)
    numbers = summary(compiled.lowered, compiled.programs["decode"])
    files = package(description, compiled, numbers, make_plan(description, compiled))
    return {name: data.decode() for name, data in files.items()}
