"""Which names weights and blocks may have: those of attributes of torch modules and their lists.

`state_dict` gives a weight the path of attributes under which it lies, so the name in a checkpoint
has to be such a path: words that no module needs itself, and numbers for what is in a list.
"""

from __future__ import annotations

import keyword
from collections.abc import Collection, Iterator

from compiler.graph.core import Graph, Op
from dsl.diagnostic import Diagnostic

# What `torch.nn.Module` and the classes of `runtime/` call their own.
TAKEN = {
    "T_destination", "add_module", "aliases", "apply", "bfloat16", "buffers", "build",
    "call_super_init", "children", "compile", "config", "count", "cpu", "cuda", "declarations",
    "decode", "device", "double", "dtype", "dump_patches", "eval", "extra_repr", "float", "forward",
    "generate", "get_buffer", "get_extra_state", "get_parameter", "get_submodule", "half",
    "hf_config", "ipu", "load", "load_state_dict", "loss", "modules", "mtia", "named_buffers",
    "named_children", "named_modules", "named_parameters", "parameters", "register_backward_hook",
    "register_buffer", "register_forward_hook", "register_forward_pre_hook",
    "register_full_backward_hook", "register_full_backward_pre_hook",
    "register_load_state_dict_post_hook", "register_load_state_dict_pre_hook", "register_module",
    "register_parameter", "register_state_dict_post_hook", "register_state_dict_pre_hook",
    "requires_grad_", "save", "set_extra_state", "set_submodule", "share_memory", "state_dict",
    "to", "to_empty", "train", "training", "type", "xpu", "zero_grad",
}  # fmt: skip


def word_problem(word: str) -> str:
    """Why a part of a name cannot be an attribute of a module; empty where it can."""
    if not (word.isascii() and word.isidentifier()):
        return "it is no word of letters, digits and `_`"
    if word.startswith("_"):
        return "it begins with `_`"
    if keyword.iskeyword(word):
        return "it is a word of Python"
    return "every torch module has something of this name" if word in TAKEN else ""


def name_problems(graph: Graph) -> Iterator[Diagnostic]:
    """Names of a finished graph that its module could not have (E239), and loops over none (E240).

    Numbers are places in a list, of blocks or of modules that hold weights, which are counted from
    0 in the order of their use.
    """
    lists: dict[str, int] = {}
    blocks = {op.text("scope").rpartition(".")[0] for op in graph.walk() if op.callee}
    for op in graph.walk():
        for symbol in op.symbols:
            yield from _weight(op, symbol, blocks, lists)
        if op.callee:
            yield from _call(op, lists)
        elif op.kind == "repeat":
            yield from _repeat(op, lists)


def _weight(
    op: Op, symbol: str, blocks: Collection[str], lists: dict[str, int]
) -> Iterator[Diagnostic]:
    parts = symbol.split(".")
    for i, part in enumerate(parts):
        if not part.isdigit():
            continue
        path = ".".join(parts[:i])
        if not path or "*" in parts or i == len(parts) - 1:
            help = "as in `norm.{0}`: a number has a name before it, and is none inside an expert"
            yield _problem("E239", op, f"a weight cannot be numbered so: {symbol}", help)
        elif path in blocks:
            help = "give one of them another name"
            yield _problem("E239", op, f"{path} is a list of blocks, and {symbol} a weight", help)
        else:
            yield from _listed(op, path, int(part), 1, lists, "modules")


def _call(op: Op, lists: dict[str, int]) -> Iterator[Diagnostic]:
    *path, last = op.text("scope").split(".")
    scope = ".".join([*path, last])
    if any(part.isdigit() or part == "*" for part in path):
        help = "as in `model.layers.{index}`; what is inside is named by the block itself"
        yield _problem("E239", op, f"a number ends the name of a block, not so in {scope}", help)
    elif last.isdigit():
        yield from _listed(op, ".".join(path), int(last), 1, lists, "blocks")


def _repeat(op: Op, lists: dict[str, int]) -> Iterator[Diagnostic]:
    calls = [o for o in op.regions[0].ops if o.callee]
    numbered = [o.text("scope") for o in calls if o.text("scope").endswith(".*")]
    if len(numbered) != 1:
        message = f"a repeat calls one block that is named by the layer's number, not {len(calls)}"
        help = "as in `h = layer(h, position, name = model.layers.{index})`"
        yield _problem("E240", op, message, help)
        return
    path = numbered[0].removesuffix(".*")
    yield from _listed(op, path, op.number("start"), op.number("count"), lists, "blocks")


def _listed(
    op: Op, path: str, start: int, count: int, lists: dict[str, int], what: str
) -> Iterator[Diagnostic]:
    known = lists.get(path, 0)
    lists[path] = max(known, start + count)
    # A block that is called once more under an old number is for the verifier to refuse; a weight
    # is shared.
    if path and start <= known:
        return
    message = f"{path}.{start} comes after {known} {what} of {path or 'a list without a name'}"
    help = f"number {what} from 0, in the order of their use, and leave none out"
    yield _problem("E239", op, message, help)


def _problem(code: str, op: Op, message: str, help: str) -> Diagnostic:
    return Diagnostic(code, message, op.spans[0] if op.spans else None, "here", help=help)
