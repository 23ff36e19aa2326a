"""Answers in a form: JSON of a schema, by what may come as the next token.

The grammar of an answer is a text, so that it goes with a request to the process of the engine;
there a `Matcher` follows the tokens that were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .text import ByteVocabulary, LearnedVocabulary, Vocabulary

MOST = 2**18
"""Characters of a grammar."""


class GrammarError(ValueError):
    """This grammar cannot be followed; the message says which part of it."""


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """The grammar of JSON of a schema, without spaces; of any object where there is none.

    Raises GrammarError for schemas that are too long.
    """
    from llguidance import LLMatcher

    text = json.dumps({"type": "object"} if schema is None else schema)
    if len(text) > MOST:
        raise GrammarError(f"the schema has more than {MOST} characters")
    # A model that may write spaces anywhere may write them for ever.
    return str(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False}))


class Grammars:
    """The grammars of answers in one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, size: int, ends: frozenset[int]) -> None:
        """`size` is that of the model's logits; of `ends`, one comes where an answer may end."""
        self._vocabulary, self._size, self._ends = vocabulary, size, sorted(ends)

    @cached_property
    def _tokenizer(self) -> Any:
        """Raises GrammarError for a model without end tokens, and for tokenizers whose tokens have
        no bytes of their own."""
        if not self._ends:
            raise GrammarError("an answer in a form needs a model with an end token")
        from llguidance import LLTokenizer, TokenizerWrapper

        if isinstance(self._vocabulary, LearnedVocabulary):
            text = self._vocabulary.data.decode()
            try:
                return LLTokenizer(text, n_vocab=self._size, eos_token=self._ends)
            except ValueError as error:
                raise GrammarError(f"this tokenizer cannot follow a grammar: {error}") from None
        assert isinstance(self._vocabulary, ByteVocabulary)
        wrapped = TokenizerWrapper(_Bytes(self._size, self._ends[0]))
        return LLTokenizer(wrapped, n_vocab=self._size, eos_token=self._ends)

    def matcher(self, grammar: str) -> Matcher:
        """Raises GrammarError for a grammar that cannot be followed."""
        from llguidance import LLMatcher

        if problem := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise GrammarError(problem)
        return Matcher(LLMatcher(self._tokenizer, grammar), self._size)


class Matcher:
    """One answer that follows a grammar."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def mask(self) -> Tensor:
        """bool [vocab] on the CPU: which tokens may come next; at its end only end tokens."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return bits.flatten()[: self._size].bool()

    def consume(self, id: int) -> None:
        """Follows a token that was chosen. Raises GrammarError for one that may not come."""
        if not self._matcher.consume_token(id):
            raise GrammarError(f"token {id} does not follow the grammar")

    def copy(self) -> Matcher:
        """Another one at the same place."""
        return Matcher(self._matcher.deep_copy(), self._size)


class _Bytes:
    """What llguidance asks of a tokenizer: bytes, and marks where there are more tokens."""

    bos_token_id = None

    def __init__(self, size: int, end: int) -> None:
        self.eos_token_id = end
        self.tokens = [bytes((i,)) if i < 256 else b"<%d>" % i for i in range(size)]
        self.special_token_ids = list(range(256, size))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)
