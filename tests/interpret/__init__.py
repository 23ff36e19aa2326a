"""The meaning of a graph: any program, at any stage of its pipeline, run on torch tensors.

Slow and plain, so that a rewrite can be proved by running the program before and after it. Each
kind of operator is one function in `RUN`, mostly the one that generated code calls. Every result
is held against its recorded type.

`dtype` overrides the element type of all floating-point tensors: in float64 only real differences
count. Without it tensors have the element types that the program declares.
"""

from tests.interpret.frame import DTYPES, State, run
from tests.interpret.operators import RUN
from tests.interpret.tensors import SIZES, random_inputs, random_weights

__all__ = ["DTYPES", "RUN", "SIZES", "State", "random_inputs", "random_weights", "run"]
