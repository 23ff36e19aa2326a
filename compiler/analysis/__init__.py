"""Facts that follow from a graph: modules, parameters, arithmetic, memory. Never torch."""

from compiler.analysis.modules import Module, Submodule, TensorCount
from compiler.analysis.summary import CONVENTIONS, PublishedRange, Summary, summary, training_flops
from compiler.analysis.work import Tally, Work, total

__all__ = [
    "CONVENTIONS",
    "Module",
    "PublishedRange",
    "Submodule",
    "Summary",
    "Tally",
    "TensorCount",
    "Work",
    "summary",
    "total",
    "training_flops",
]
