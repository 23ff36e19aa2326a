"""Every operator of the graph, by name."""

from __future__ import annotations

from compiler.ops import attention, comm, control, linear, loss, moe, norm, tensor
from compiler.ops.base import Operator, Site, TypeMismatch

_ALL: tuple[type[Operator], ...] = (
    linear.Embedding,
    linear.Linear,
    linear.HeadLinear,
    norm.RMSNorm,
    norm.SiLU,
    norm.Sigmoid,
    norm.Softmax,
    attention.RopeTable,
    attention.Rotate,
    attention.Attention,
    attention.LatentAttention,
    attention.CacheEntry,
    attention.CacheAppend,
    moe.TopkGroups,
    moe.Experts,
    moe.Permute,
    moe.GroupedLinear,
    moe.Unpermute,
    moe.SequenceBalanceLoss,
    moe.ExpertLoad,
    loss.CrossEntropy,
    loss.CountLabels,
    tensor.Add,
    tensor.Sub,
    tensor.Mul,
    tensor.Div,
    tensor.Scale,
    tensor.Cast,
    tensor.Constant,
    tensor.Sum,
    tensor.Split,
    tensor.Concat,
    tensor.Flatten,
    tensor.Unflatten,
    tensor.Broadcast,
    tensor.DropFirst,
    tensor.DropLast,
    tensor.LastEntry,
    comm.Dispatch,
    comm.Combine,
    comm.Send,
    comm.Recv,
    comm.AllGather,
    comm.ReduceScatter,
    comm.AllReduce,
    control.Call,
    control.Repeat,
    control.Yield,
    control.Return,
)

OPS: dict[str, type[Operator]] = {op.kind: op for op in _ALL}

__all__ = ["OPS", "Operator", "Site", "TypeMismatch"]
