"""The leaf types of a spec: text, numbers, names and blocks.

Validation runs over the YAML tree itself: a leaf type reads a `yaml.Scalar`, so that its errors
know their place, and evaluates expressions over the parameters.
"""

from __future__ import annotations

import keyword
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

from pydantic import (
    BeforeValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dsl import ast, yaml
from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.evaluate import (
    FUNCTIONS,
    Constant,
    Value,
    describe,
    evaluate,
    expression,
    free_names,
)
from dsl.source import Span
from dsl.suggest import did_you_mean
from dsl.syntax import KEYWORDS

# A path into a spec: keys, and indices of items.
Loc = tuple[int | str, ...]

EXPRESSION = "An expression over parameters, or a number with a unit: 18 * hidden_size // 7, 4K"
CONDITION = "true or false, or a condition over parameters: hidden_size > 4K"
MAX_NAME = 64


@dataclass(frozen=True)
class Scope:
    """What expressions may use. `failed` names have a diagnostic of their own already."""

    values: Mapping[str, Constant]
    failed: frozenset[str] = frozenset()

    def evaluate(self, expr: ast.Expr) -> Value:
        """The value of `expr`; refuses the leaf, in silence if only a failed name is to blame."""
        if any(name.value in self.failed for name in free_names(expr)):
            refuse()
        try:
            return Value(evaluate(expr, self.values), expr.span)
        except DiagnosticError as error:
            refuse(*error.diagnostics)


@dataclass(frozen=True)
class BlockUse:
    """A block in a place of the model: `SwiGLU(intermediate_size=18432)`.

    `span` is None where the spec names no block and the usual one is taken.
    """

    name: str
    arguments: Mapping[str, Value] = field(default_factory=dict)
    span: Span | None = None

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        given = ", ".join(f"{name}={text_of(v.value)}" for name, v in self.arguments.items())
        return f"{self.name}({given})"


def text_of(value: Constant) -> str:
    """A constant as a spec writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def refuse(*diagnostics: Diagnostic) -> NoReturn:
    """Ends the validation of a leaf with what is wrong; `dsl.schema.validate` reports it."""
    raise PydanticCustomError("diagnostics", "see the context", {"diagnostics": diagnostics})


def _scalar(node: object, wanted: str) -> yaml.Scalar:
    if not isinstance(node, yaml.Scalar):
        raise PydanticCustomError("wanted", "{wanted}", {"wanted": wanted})
    return node


def _expression(scalar: yaml.Scalar) -> ast.Expr:
    try:
        return expression(scalar)
    except DiagnosticError as error:
        refuse(*error.diagnostics)


@dataclass(frozen=True)
class Number:
    """A number from `minimum` to `maximum`, or an expression of one.

    `name` is what messages call it.
    """

    name: str
    minimum: int = 0
    whole: bool = True
    maximum: int | None = None

    def validate(self, node: object, info: Any) -> int | float:
        wanted = "a whole number" if self.whole else "a number"
        scalar = _scalar(node, wanted)
        value = info.context.evaluate(_expression(scalar)).value
        if isinstance(value, bool | str) or (self.whole and isinstance(value, float)):
            help = ""
            if isinstance(value, float):
                help = "write it without a point (1500, 1.5K), and divide by `//`"
            elif isinstance(value, str) and scalar.quoted:
                help = "remove the quotes"
            message = f"{self.name} must be {wanted}, not {describe(value)}"
            refuse(Diagnostic("E302", message, scalar.span, f"expected {wanted}", help=help))
        if value < self.minimum:
            message = f"{self.name} below {self.minimum}: {value}"
            label = f"must be at least {self.minimum}"
            refuse(Diagnostic("E303", message, scalar.span, label))
        if self.maximum is not None and value > self.maximum:
            message = f"{self.name} above {self.maximum}: {value}"
            label = f"must be at most {self.maximum}"
            refuse(Diagnostic("E303", message, scalar.span, label))
        return int(value) if self.whole else float(value)

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number = {"type": "integer" if self.whole else "number", "minimum": self.minimum}
        if self.maximum is not None:
            number["maximum"] = self.maximum
        return {"anyOf": [number, {"type": "string", "description": EXPRESSION}]}


@dataclass(frozen=True)
class Numbers(Number):
    """One number, or a list of at least one."""

    def validate(self, node: object, info: Any) -> Any:
        if not isinstance(node, tuple):
            return super().validate(node, info)
        if not node:
            raise PydanticCustomError("too_short", "{actual_length}", {"actual_length": 0})
        return tuple(super(Numbers, self).validate(item, info) for item in node)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        one = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}]}


def choice(*known: str) -> BeforeValidator:
    """One of a few words."""

    def validate(node: object) -> str:
        scalar = _scalar(node, " or ".join(known))
        if scalar.value not in known:
            message = f"`{scalar.value}` is none of {', '.join(known)}"
            help = did_you_mean(scalar.value, known)
            refuse(Diagnostic("E305", message, scalar.span, "unknown choice", help=help))
        return scalar.value

    return BeforeValidator(validate)


def _flag(node: object, info: ValidationInfo[Scope]) -> bool:
    scalar = _scalar(node, "true or false")
    value = info.context.evaluate(_expression(scalar)).value
    if not isinstance(value, bool):
        message = f"true or false is needed here, not {describe(value)}"
        refuse(Diagnostic("E302", message, scalar.span, "expected true or false"))
    return value


def _text(node: object) -> str:
    scalar = _scalar(node, "text")
    if not scalar.value.strip():
        refuse(Diagnostic("E317", "there is no text here", scalar.span, "nothing follows"))
    return scalar.value


# Importing a model must not hide what it needs itself.
_TAKEN_MODULES = sys.stdlib_module_names | {
    "backends", "benchmarks", "compiler", "dsl", "dslc", "numpy", "runtime", "safetensors",
    "specs", "tests", "torch", "transformers", "triton",
}  # fmt: skip


def _identifier_problem(name: str) -> str:
    if not (name.isascii() and name.isidentifier()) or name.startswith("_"):
        return "it must be ASCII letters, digits and `_`, and begin with a letter"
    if len(name) > MAX_NAME:
        return f"it is longer than {MAX_NAME} characters"
    if keyword.iskeyword(name) or name in KEYWORDS:
        return "it is a word of Python or of the block language"
    return ""


def _model_problem(name: str) -> str:
    problem = _identifier_problem(name)
    if not problem and name.lower() in _TAKEN_MODULES:
        problem = f"importing it would hide the module `{name.lower()}`"
    return problem


def _model_name(node: object) -> str:
    name = _text(node)
    problem = _model_problem(name)
    if problem:
        message = f"`{name}` cannot name a model: {problem}"
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower())
        plain = plain[:40].strip("_")
        plain = plain if plain[:1].isalpha() else f"model_{plain}".strip("_")
        if _model_problem(plain):
            plain += "_model"
        label, help = "the name of a Python package", f"for example `{plain}`"
        refuse(Diagnostic("E304", message, _scalar(node, "text").span, label, help=help))
    return name


def _param_name(name: str) -> str:
    problem = _identifier_problem(name)
    if not problem and name in FUNCTIONS:
        problem = "it is a function of expressions"
    if problem:
        # A key has no node; the place follows from its path.
        raise PydanticCustomError("param_name", "{problem}", {"problem": problem})
    return name


def _block_use(node: object, info: ValidationInfo[Scope]) -> BlockUse:
    wanted = "expected a block, such as MLA or SwiGLU(intermediate_size=18432)"
    scalar = _scalar(node, wanted.removeprefix("expected "))
    # Quoted ones, too: inside {...} and [...] a comma would end a plain value.
    content = scalar.content
    if content is None:
        message = "a block is written on one line and without escapes"
        refuse(Diagnostic("E302", message, scalar.span, wanted))
    expr = _expression(yaml.Scalar(scalar.value, False, content))
    match expr:
        case ast.Name():
            return BlockUse(expr.value, {}, content)
        case ast.Call():
            return BlockUse(expr.function.value, _arguments(expr, info.context), content)
    refuse(Diagnostic("E302", f"`{content.text}` names no block", content, wanted))


def _arguments(call: ast.Call, scope: Scope) -> dict[str, Value]:
    values: dict[str, Value] = {}
    refusals: list[PydanticCustomError] = []
    for argument in call.arguments:
        try:
            name = _argument_name(argument, values)
            values[name] = scope.evaluate(argument.value)
        except PydanticCustomError as refusal:
            refusals.append(refusal)
    if refusals:
        refuse(*(d for refusal in refusals for d in (refusal.context or {})["diagnostics"]))
    return values


def _argument_name(argument: ast.Argument, given: Mapping[str, Value]) -> str:
    name = argument.name
    if name is None:
        message = "arguments of a block are written `name=value`"
        refuse(Diagnostic("E302", message, argument.span, "this one has no name"))
    if name.value in given:
        message, help = f"`{name.value}` is given twice", "keep one of the two"
        refuse(Diagnostic("E302", message, name.span, "given again", help=help))
    return name.value


Flag = Annotated[
    bool,
    BeforeValidator(_flag),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "string", "description": CONDITION}]}),
]
Text = Annotated[str, BeforeValidator(_text), WithJsonSchema({"type": "string"})]
ModelName = Annotated[
    str,
    BeforeValidator(_model_name),
    WithJsonSchema({"type": "string", "pattern": r"^[A-Za-z]\w*$", "maxLength": MAX_NAME}),
]
ParamName = Annotated[str, BeforeValidator(_param_name)]
Block = Annotated[
    BlockUse,
    BeforeValidator(_block_use),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": r"^[A-Za-z]\w*(\(.*\))?$",
            "examples": ["MLA", "SwiGLU(intermediate_size=18432)"],
        }
    ),
]
