"""What a calibration says: how fast the hardware of a cluster was measured to be."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from dsl.schema.base import Section
from dsl.schema.values import Flag, Number, Text, choice

ProductType = Literal["fp8", "bf16", "fp32"]


class MeasuredProduct(Section):
    """A matrix product [m, k] x [k, n], and how long it took."""

    dtype: Annotated[ProductType, choice(*get_args(ProductType))] = Field(
        description="fp8, bf16 or fp32: the element type of its operands"
    )
    m: Annotated[int, Number("m", 1)] = Field(description="Rows: tokens, or outputs of a gradient")
    n: Annotated[int, Number("n", 1)] = Field(description="Columns")
    k: Annotated[int, Number("k", 1)] = Field(description="The dimension that is summed over")
    groups: Annotated[int, Number("groups", 1)] = Field(
        1, description="Experts, between which rows are dealt; of a gradient, the sums over tokens"
    )
    weight_grad: Flag = Field(False, description="Whether it is the gradient of a weight")
    accumulates: Flag = Field(
        False, description="Of a gradient: whether it was added to an FP32 sum in the same time"
    )
    microseconds: Annotated[float, Number("microseconds", 0, whole=False)] = Field(
        description="How long it took"
    )

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return 2e6 * self.m * self.n * self.k / max(self.microseconds, 1e-9)


class MeasuredAttention(Section):
    """Causal attention, in FLOP/s of the half of the scores that are needed."""

    forward: Annotated[int, Number("forward", 1)] = Field(description="Two products")
    backward: Annotated[int, Number("backward", 1)] = Field(
        description="Five products: scores are made again"
    )


class MeasuredLink(Section):
    """How long sending takes: `microseconds` and the bytes over `bandwidth`."""

    bandwidth: Annotated[int, Number("bandwidth", 1)] = Field(
        description="Bytes a second that leave a rank; of dispatch and combine across nodes, the "
        "node"
    )
    microseconds: Annotated[float, Number("microseconds", 0, whole=False)] = Field(
        0.0, description="Besides, for each"
    )


class Calibration(Section):
    """Measured rates of a cluster. What is left out counts at the rates of the cluster file."""

    calibration: Text = Field(description="The name of the cluster")
    about: Text = Field("", description="One line for people")
    products: tuple[MeasuredProduct, ...] = Field(
        (), description="Matrix products; others count at the rate of the most similar one"
    )
    attention: MeasuredAttention | None = Field(None, description="Causal attention")
    memory_bandwidth: Annotated[int | None, Number("memory_bandwidth", 1)] = Field(
        None, description="Bytes a second that other operators read and write"
    )
    launch: Annotated[float, Number("launch", 0, whole=False)] = Field(
        0.0, description="Microseconds between two operators"
    )
    dispatch: MeasuredLink | None = Field(None, description="Tokens to their experts")
    combine: MeasuredLink | None = Field(None, description="Results back to the tokens")
    pair: MeasuredLink | None = Field(None, description="From one pipeline rank to the next")
    ring: MeasuredLink | None = Field(
        None, description="Reduce-scatter of gradients and all-gather of weights"
    )
