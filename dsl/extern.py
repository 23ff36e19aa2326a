"""The function of an `extern`: its settings, and its file, which is read and never run.

A file of Python in the folder of the block file is parsed with `ast`, to find the function and its
arguments. Builds hold a copy of the file; importing a build runs it.
"""

from __future__ import annotations

import ast as python
import keyword
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from dsl import ast
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.read import read_source
from dsl.source import Source
from dsl.suggest import did_you_mean

SETTINGS = ("file", "function", "gradient", "per", "flops")
REQUIRED = ("file", "per", "flops")
PER = ("token", "sequence")
_FILE = re.compile(r"([A-Za-z][A-Za-z0-9_]*)\.py")


class UserFiles:
    """The Python files of the externs of a model, each under a module name of its own."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self._modules: dict[Path, str] = {}
        self._trees: dict[str, python.Module] = {}

    def function(self, block: ast.Block) -> ast.Function:
        """What an extern says of its function, held against its file.

        Raises `DiagnosticError`: E250 for settings, E251 where the function does not fit.
        """
        settings = _settings(block)
        texts = {name: _text(settings[name]) for name in SETTINGS[:4] if name in settings}
        name = texts.get("function", block.name.value)
        place = settings.get("function", settings["file"])
        if texts["per"] not in PER:
            help = "`token`: each by itself; `sequence`: it reads several tokens of a sequence"
            _fail("E250", f"per is token or sequence, not {texts['per']}", settings["per"], help)
        _check_types(block, texts["per"])
        _check_flops(block, settings["flops"])
        module = self._module(texts["file"], settings["file"])
        numbers = self._check_function(
            module, name, place, [a.name.value for a in block.arguments], block
        )
        gradient = texts.get("gradient", "")
        if gradient:
            given = [f"d_{_result_name(r, i)}" for i, r in enumerate(block.results) if _is_real(r)]
            taken = [*given, *(a.name.value for a in block.arguments)]
            found = self._check_function(module, gradient, settings["gradient"], taken, block)
            if set(found) != set(numbers):
                words = ", ".join(numbers) or "no numbers"
                message = (
                    f"{gradient} takes other numbers than {name}: {', '.join(found) or 'none'}"
                )
                _fail("E251", message, settings["gradient"], f"{name} takes {words}")
        _check_params(block, numbers, settings["flops"].value)
        return ast.Function(module, name, gradient, texts["per"], numbers, settings["flops"].value)

    def _module(self, file: str, at: ast.Setting) -> str:
        """The module name of a file in the folder of the block file."""
        match = _FILE.fullmatch(file)
        if match is None or keyword.iskeyword(match[1]):
            help = 'the file lies beside the block file: `file = "activations.py"`'
            _fail("E250", f"{file!r} is no name of a Python file", at, help)
        assert match is not None
        source = at.span.source
        folder = source.path.parent if source.path else Path()
        path = (folder / file).resolve()
        if path not in self._modules:
            head, _, _ = source.name.replace("\\", "/").rpartition("/")
            text = read_source(folder / file, f"{head}/{file}" if head else file, at.value.span)
            tree = _parse(text, at)
            _check_imports(tree, folder, text, at)
            module = base = match[1]
            count = 1
            while module in self.sources:
                count += 1
                module = f"{base}_{count}"
            self._modules[path], self.sources[module] = module, text
            self._trees[module] = tree
        return self._modules[path]

    def _check_function(
        self, module: str, name: str, at: ast.Setting, tensors: Sequence[str], block: ast.Block
    ) -> tuple[str, ...]:
        """The parameters of the extern that the function takes, by name."""
        source, tree = self.sources[module], self._trees[module]
        defined = {n.name: n for n in tree.body if isinstance(n, python.FunctionDef)}
        if name not in defined:
            help = (
                did_you_mean(name, defined)
                or f"define it there: `def {name}({', '.join(tensors)}):`"
            )
            _fail("E251", f"{source.name} defines no function {name} at its top level", at, help)
        given = defined[name].args
        place = f"{source.name}:{defined[name].lineno}"
        if given.vararg or given.kwarg:
            help = "name each argument, so that it can be checked"
            _fail("E251", f"{name} takes any arguments ({place})", at, help)
        positional = [a.arg for a in (*given.posonlyargs, *given.args)]
        optional = set(positional[len(positional) - len(given.defaults) :])
        optional |= {a.arg for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d}
        rest = [*positional[len(tensors) :], *(a.arg for a in given.kwonlyargs)]
        by_position = [a.arg for a in given.posonlyargs[len(tensors) :]]
        params = [p.name.value for p in block.params]
        if len(positional) < len(tensors):
            message = f"{name} takes {len(positional)} tensors ({place}), not {len(tensors)}"
            _fail("E251", message, at, f"it is given {', '.join(tensors)}")
        for other in rest:
            if (other not in params and other not in optional) or other in by_position:
                message = f"{name} takes {other} ({place}), which the extern does not give"
                _fail("E251", message, at, f"declare `params {other}`, or give it a default there")
        return tuple(other for other in rest if other in params)


def _settings(block: ast.Block) -> dict[str, ast.Setting]:
    found: dict[str, ast.Setting] = {}
    for setting in block.settings:
        name = setting.name.value
        if name not in SETTINGS or name in found:
            what, help = "is given twice", "keep one of the two"
            if name not in SETTINGS:
                what = "is nothing that an extern says"
                help = did_you_mean(name, SETTINGS) or f"it says {', '.join(SETTINGS)}"
            raise DiagnosticError(
                [Diagnostic("E250", f"{name} {what}", setting.name.span, "here", help=help)]
            )
        found[name] = setting
    for name in REQUIRED:
        if name not in found:
            help = {
                "file": 'the Python file beside this one: `file = "activations.py"`',
                "per": '`per = "token"`, or `per = "sequence"` if it reads several tokens',
                "flops": "those of matrix products, for one token: `flops = 0` if it has none",
            }[name]
            message = f"{block.name.value} does not say its {name}"
            raise DiagnosticError(
                [Diagnostic("E250", message, block.name.span, "this extern", help=help)]
            )
    return found


def _text(setting: ast.Setting) -> str:
    if not isinstance(setting.value, ast.Text):
        name = setting.name.value
        _fail("E250", f"{name} is quoted text", setting, f'write `{name} = "..."`')
    assert isinstance(setting.value, ast.Text)
    return setting.value.value


def _check_types(block: ast.Block, per: str) -> None:
    """Results are of tokens, like the first argument: what ranks and decoders divide is tokens."""
    first, *_ = block.arguments
    known = {p.name.value for p in block.params}
    known |= {d.value for a in block.arguments for d in a.type.dims}
    leading = _leading(first.type)
    for argument in block.arguments:
        names = [dim.value for dim in argument.type.dims]
        if "context" in names and (per == "token" or names[:2] != ["batch", "context"]):
            message = (
                f"{argument.name.value} is over `context`, which only a function of sequences reads"
            )
            help = 'write `per = "sequence"`, and `[batch, context, ..]`'
            raise DiagnosticError(
                [Diagnostic("E250", message, argument.span, "this argument", help=help)]
            )
    for result in block.results:
        type = result.type if isinstance(result, ast.Value) else result
        wanted = ("batch", "seq") if per == "sequence" else leading
        if not leading or _leading(type) != wanted or (per == "sequence" and leading != wanted):
            message = f"{block.name.value} gives no result for each token"
            help = "results begin as the first argument does, with `..` or `batch, seq`"
            if per == "sequence":
                help = "results and the first argument begin with `batch, seq`"
            raise DiagnosticError(
                [Diagnostic("E250", message, type.span, "this result", help=help)]
            )
        for dim in type.dims:
            if dim.value not in known:
                message = f"{dim.value} is the size of no argument"
                help = "name a dimension of an argument, or declare it under `params`"
                raise DiagnosticError(
                    [Diagnostic("E250", message, dim.span, "not known", help=help)]
                )


def _leading(type: ast.TensorType) -> tuple[str, ...]:
    names = tuple(dim.value for dim in type.dims)
    if names[:1] == ("..",):
        return names[:1]
    return names[:2] if names[:2] == ("batch", "seq") else ()


def _result_name(result: ast.TensorType | ast.Value, index: int) -> str:
    return result.name.value if isinstance(result, ast.Value) else f"result_{index + 1}"


def _is_real(result: ast.TensorType | ast.Value) -> bool:
    type = result.type if isinstance(result, ast.Value) else result
    return type.dtype in (None, "bf16", "f32")


def _check_flops(block: ast.Block, setting: ast.Setting) -> None:
    """They may read parameters, and dimensions of arguments but for `batch`."""
    known = {p.name.value for p in block.params}
    known |= {d.value for a in block.arguments for d in a.type.dims} - {"..", "batch"}
    for name in ast.names_in(setting.value):
        if name not in known:
            help = did_you_mean(name, known) or f"it may read {', '.join(sorted(known))}"
            _fail("E250", f"flops reads {name}, which is not known here", setting, help)


def _check_params(block: ast.Block, numbers: Sequence[str], flops: ast.Expr) -> None:
    """Every parameter is a dimension, or read by the function or by `flops`."""
    types = [a.type for a in block.arguments]
    types += [r.type if isinstance(r, ast.Value) else r for r in block.results]
    read = {dim.value for type in types for dim in type.dims} | {*numbers, *ast.names_in(flops)}
    for param in block.params:
        read |= set(ast.names_in(param.default)) if param.default else set()
    for param in block.params:
        if param.name.value not in read:
            message = f"{param.name.value} has no effect"
            help = "the function does not take it, and no dimension is called so"
            raise DiagnosticError(
                [Diagnostic("E250", message, param.span, "nobody reads it", help=help)]
            )


def _parse(source: Source, at: ast.Setting) -> python.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever runs the file sees them
            return python.parse(source.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = (
            f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        )
        message = f"{source.name} is no Python that can be read: {where}"
        raise DiagnosticError([Diagnostic("E251", message, at.value.span, "named here")]) from None


def _check_imports(tree: python.Module, folder: Path, source: Source, at: ast.Setting) -> None:
    """Only the file itself is copied: it imports no other file of its folder."""
    for node in python.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, python.Import) else []
        if isinstance(node, python.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            top = name.split(".")[0]
            if (
                not top
                or (folder / f"{top}.py").is_file()
                or (folder / top / "__init__.py").is_file()
            ):
                message = (
                    f"{source.name} imports {name} from beside it, and a build copies only the file"
                )
                _fail("E251", message, at, "move what it needs into the file")


def _fail(code: str, message: str, at: ast.Setting, help: str) -> None:
    raise DiagnosticError([Diagnostic(code, message, at.value.span, "here", help=help)])
