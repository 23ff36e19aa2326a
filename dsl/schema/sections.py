"""The sections of a spec, with what each key means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field

from dsl.schema.base import Section
from dsl.schema.train import Train
from dsl.schema.values import (
    Block,
    BlockUse,
    ModelName,
    Number,
    Numbers,
    ParamName,
    Text,
    choice,
)

ScheduleName = Literal["1f1b", "zero_bubble", "dualpipe", "dualpipe_v"]


class LayerGroup(Section):
    """Equal layers that follow each other; other keys fill the slots of their block."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Block] = Field(init=False)

    repeat: Annotated[int, Number("repeat", 1)] = Field(description="How many layers")
    block: Block = Field(
        BlockUse("DecoderLayer"),
        description="The block of each layer",
        json_schema_extra={"default": "DecoderLayer"},
    )

    @property
    def slots(self) -> Mapping[str, BlockUse]:
        return self.__pydantic_extra__


class MTP(Section):
    """Multi-token prediction; other keys fill the slots of its block."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Block] = Field(init=False)

    depth: Annotated[int, Number("MTP depth", 0)] = Field(
        0, description="How many tokens beyond the next are predicted"
    )
    block: Block = Field(
        BlockUse("MTP"),
        description="The block of each depth",
        json_schema_extra={"default": "MTP"},
    )

    @property
    def slots(self) -> Mapping[str, BlockUse]:
        return self.__pydantic_extra__


class Architecture(Section):
    """Which blocks the model is made of."""

    block: Block = Field(
        BlockUse("CausalLM"),
        description="The block of the whole model",
        json_schema_extra={"default": "CausalLM"},
    )
    layers: tuple[LayerGroup, ...] = Field(min_length=1, description="Layers, from first to last")
    mtp: MTP = Field(default_factory=MTP, description="Multi-token prediction")


class SequenceLimits(Section):
    """Lengths and special tokens of sequences."""

    max_position_embeddings: Annotated[int, Number("max_position_embeddings", 1)] = Field(
        description="The longest sequence, in tokens"
    )
    bos_token_id: Annotated[int | None, Number("bos_token_id")] = Field(
        None, description="The token that begins a text"
    )
    eos_token_id: Annotated[int | tuple[int, ...] | None, Numbers("eos_token_id")] = Field(
        None,
        description="The token that ends a text, or a list: generation stops at any of them, "
        "documents end with the first",
    )


Policy = Literal["bf16", "fp32", "fp8_blockwise"]
Product = Literal["fp8", "bf16", "fp32"]
ScaleFormat = Literal["recipe", "fp32", "ue8m0"]


class Precision(Section):
    """The element type of weights and activations, and the precision of products with weights."""

    policy: Annotated[Policy, choice(*get_args(Policy))] = Field(
        "bf16", description="bf16, fp32, or fp8_blockwise: bf16 with FP8 products"
    )
    scale_format: Annotated[ScaleFormat, choice(*get_args(ScaleFormat))] = Field(
        "recipe",
        description="How FP8 scales are kept: fp32, ue8m0 (powers of two, as DeepSeek-V3.1), or"
        " recipe (powers of two where DeepSeek-V3 trains with them)",
    )
    overrides: dict[str, Annotated[Product, choice(*get_args(Product))]] = Field(
        default_factory=dict,
        description="fp8, bf16 or fp32 for the products of a kind (attention_projections, head, ..)"
        " or of weights by name (o_proj, experts.*.up_proj); the last that fits counts",
    )


ExchangeName = Literal["torch", "deep_ep", "symmetric_memory"]


class Parallel(Section):
    """How training is spread over a cluster. Sizes count ranks, one to a GPU."""

    cluster: Text | None = Field(
        None,
        description="A cluster file: a name of those shipped, or a path; by default one node with "
        "a GPU for each pipeline and expert rank",
    )
    pipeline: Annotated[int, Number("pipeline", 1)] = Field(
        1, description="Stages that the layers are cut into, each on ranks of its own"
    )
    expert: Annotated[int, Number("expert", 1)] = Field(
        1, description="Ranks that the routed experts of a layer are spread over"
    )
    zero: Annotated[int, Number("zero", 0, maximum=1)] = Field(
        1, description="1: optimizer state is sharded over the ranks that hold a weight; 0: not"
    )
    schedule: Annotated[ScheduleName, choice(*get_args(ScheduleName))] = Field(
        "1f1b",
        description="In which order a pipeline rank works: 1f1b, zero_bubble, dualpipe or "
        "dualpipe_v",
    )
    sequence_length: Annotated[int, Number("sequence_length", 1)] = Field(
        description="Tokens of a training sequence; by default that of `train`"
    )
    batch: Annotated[int, Number("batch", 1)] = Field(
        description="Sequences of a step, all ranks together; by default that of `train`"
    )
    micro_batch: Annotated[int, Number("micro_batch", 1)] = Field(
        1,
        description="Sequences that go through the pipeline at a time; by default that of `train`",
    )
    exchange: Annotated[ExchangeName, choice(*get_args(ExchangeName))] = Field(
        "torch",
        description="What moves tokens to the ranks of their experts: torch, deep_ep: DeepEP, "
        "which has to be installed, or symmetric_memory: NVSHMEM, which comes with torch for CUDA",
    )


SIZES = ("sequence_length", "batch", "micro_batch")
"""Keys of `train` and of `parallel`: what one leaves out is as in the other."""

Products = Literal["fastest", "triton", "deep_gemm"]
Attention = Literal["fastest", "triton", "flash_mla"]


class Kernels(Section):
    """Whose kernels a build with `--target sm_90` calls; dslc's own where a library is missing."""

    products: Annotated[Products, choice(*get_args(Products))] = Field(
        "fastest",
        description="fastest: a library where it was measured to be faster; triton: own kernels; "
        "deep_gemm: DeepGEMM for products with weights in FP8",
    )
    attention: Annotated[Attention, choice(*get_args(Attention))] = Field(
        "fastest",
        description="fastest: a library where it was measured to be faster; triton: own kernels; "
        "flash_mla: FlashMLA for decoding in the latent space",
    )


class Spec(Section):
    """A model: its parameters, its architecture and how it is trained."""

    model: ModelName = Field(description="Name of the model and of the package that is built")
    about: Text = Field("", description="One line for people")
    blocks: tuple[Text, ...] = Field(
        min_length=1, description="Block files: names of the standard library, or paths"
    )
    params: dict[ParamName, int | float | bool | str] = Field(
        default_factory=dict, description="Numbers, flags and quoted text, by name"
    )
    architecture: Architecture = Field(description="Which blocks the model is made of")
    sequence: SequenceLimits = Field(description="Lengths and special tokens of sequences")
    precision: Precision = Field(default_factory=Precision, description="Element types")
    train: Train = Field(default_factory=Train, description="Training")
    parallel: Parallel | None = Field(None, description="How training is spread over a cluster")
    kernels: Kernels = Field(default_factory=Kernels, description="Libraries of kernels")


# What a file may say besides: how it is made from another. `dsl.compose` reads these.
VARIANT_KEYS = {
    "extends": "The spec that this one changes, relative to this file",
    "set": "Changes to the spec that this one extends: path and new value",
    "variants": "Named sets of changes, chosen by `--variant NAME`",
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of spec files, for editors (draft 2020-12)."""
    schema = Spec.model_json_schema()
    required = schema.pop("required")
    overlay = {"type": "object", "propertyNames": {"pattern": r"^[A-Za-z]\w*(\.\w+)*$"}}
    schema["properties"] |= {
        "extends": {"type": "string", "description": VARIANT_KEYS["extends"]},
        "set": {**overlay, "description": VARIANT_KEYS["set"]},
        "variants": {
            "type": "object",
            "additionalProperties": overlay,
            "description": VARIANT_KEYS["variants"],
        },
    }
    # A file that extends another may leave out any key.
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": required}
    sizes = schema["$defs"]["Parallel"]
    sizes["required"] = [key for key in sizes["required"] if key not in SIZES]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
