"""Facts that follow from a graph: modules, parameters, arithmetic, memory. Never torch."""

from compiler.analysis.modules import Module, Part, Tensor
from compiler.analysis.summary import CONVENTIONS, Published, Summary, summary, training_flops
from compiler.analysis.work import Tally, Work, total

__all__ = [
    "CONVENTIONS",
    "Module",
    "Part",
    "Published",
    "Summary",
    "Tally",
    "Tensor",
    "Work",
    "summary",
    "total",
    "training_flops",
]
