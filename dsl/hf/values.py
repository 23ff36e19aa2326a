"""What a description says of each block's parameters, for a `config.json` that has one of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsl.evaluate import Constant, evaluate
from dsl.schema import BlockUse
from specs import BLOCKS

if TYPE_CHECKING:
    from dsl.load import Description


class OtherModelError(Exception):
    """The description is no model of the family; ends the attempt to write it as one."""


def is_shipped(description: Description, name: str) -> bool:
    """Whether the block is the standard library's and not a user's of the same name."""
    path = description.blocks[name].span.source.path
    return path is not None and path.parent.resolve() == BLOCKS.resolve()


def require(condition: bool) -> None:
    if not condition:
        raise OtherModelError


class Values:
    """Parameters as blocks see them: their argument, else the spec's value, else their default."""

    def __init__(self, description: Description) -> None:
        self.blocks = description.blocks
        self.params: Mapping[str, Constant] = {
            name: value.value for name, value in description.params.items()
        }

    def shared(self, name: str, uses: Iterable[BlockUse]) -> Constant:
        """The one value that all uses have; a config has no room for several."""
        found = {self._value(name, use) for use in uses}
        require(len(found) == 1)
        return found.pop()

    def real(self, name: str, uses: Iterable[BlockUse]) -> float:
        """The same as a float, which transformers wants even where the value is whole."""
        return float(self.shared(name, uses))

    def _value(self, name: str, use: BlockUse) -> Constant:
        if name in use.arguments:
            return use.arguments[name].value
        if name in self.params:
            return self.params[name]
        defaults = {p.name.value: p.default for p in self.blocks[use.name].params}
        default = defaults.get(name)
        if default is None:
            raise OtherModelError
        return evaluate(default, self.params)
