"""What a cluster file says: the hardware that a model is planned for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dsl.schema.base import Section
from dsl.schema.values import Number, Text


class Rates(Section):
    """Dense products that one GPU does at its best, in FLOP/s by format."""

    bf16: Annotated[int | None, Number("bf16", 1)] = Field(None, description="In BF16")
    fp8: Annotated[int | None, Number("fp8", 1)] = Field(None, description="In FP8")


class Links(Section):
    """What one GPU can send, in bytes a second."""

    inside: Annotated[int | None, Number("inside", 1)] = Field(
        None, description="To GPUs of its node"
    )
    across: Annotated[int | None, Number("across", 1)] = Field(None, description="To other nodes")


class Cluster(Section):
    """Equal nodes of equal GPUs. What has no source is left out, and then not estimated."""

    cluster: Text = Field(description="Name of the cluster")
    about: Text = Field("", description="One line for people")
    nodes: Annotated[int, Number("nodes", 1)] = Field(description="How many nodes")
    gpus_per_node: Annotated[int, Number("gpus_per_node", 1)] = Field(
        description="GPUs, and so ranks, of each node"
    )
    memory: Annotated[int | None, Number("memory", 1)] = Field(
        None, description="Bytes of memory of a GPU; without it any plan fits"
    )
    memory_bandwidth: Annotated[int | None, Number("memory_bandwidth", 1)] = Field(
        None, description="Bytes a second between a GPU and its memory"
    )
    flops: Rates = Field(default_factory=Rates, description="Products in FLOP/s by format")
    links: Links = Field(default_factory=Links, description="Bytes a second that a GPU can send")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node
