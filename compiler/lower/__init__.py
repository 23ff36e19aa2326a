"""From a checked description to a graph: blocks are bound to numbers and their equations typed."""

from compiler.lower.model import lower

__all__ = ["lower"]
