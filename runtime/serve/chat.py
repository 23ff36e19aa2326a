"""Messages to the tokens of a prompt, by the chat template of a model.

Templates are Jinja, as published models have them, rendered in a sandbox as transformers does it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .text import ByteVocabulary, LearnedVocabulary, Vocabulary, load_tokenizer

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
PLAIN = """\
{% for message in messages %}{{ message.role.capitalize() }}:\
{% if message.role == "assistant" %}{% generation %} {{ message.content }}
{% endgeneration %}{% else %} {{ message.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""
PLAIN_STOPS = ("\nUser:", "\nSystem:")

# Characters that no text has (Unicode, noncharacters): they mark places in what is rendered.
_NONCHARACTERS = tuple(map(chr, range(0xFDD0, 0xFDF0)))

# Variables that `{% generation %}` shows before and after what the assistant says.
_BEGINS, _ENDS = "_generation_begins", "_generation_ends"

Message = Mapping[str, str]
Span = tuple[int, int, int]
"""A token of a text: begin, end and id."""


class ChatError(ValueError):
    """These messages give no prompt; the message says why."""


class ChatTemplate:
    """A template with the special tokens that it may name. Rendering runs no code but its own."""

    def __init__(self, source: str, special: Mapping[str, str], stops: Sequence[str] = ()) -> None:
        """`stops` end an answer. Raises ChatError for a source that is not Jinja."""
        self.stops = tuple(stops)
        self._special = dict(special)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
            found = environment.parse(source).find_all(nodes.Name)
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template is not valid Jinja: {error}") from None
        self.marks_answers = any(node.name == _BEGINS for node in found)
        """Whether it says by `{% generation %}` what the assistant says."""

    def render(
        self,
        messages: Sequence[Message],
        answer: bool,
        variables: Mapping[str, Any],
        around: tuple[str, str] = ("", ""),
    ) -> str:
        """`answer` begins the message of the assistant; `around` is put before and behind what the
        template marks as said by it. Raises ChatError."""
        own = {"messages": messages, "add_generation_prompt": answer, **self._special}
        own |= zip((_BEGINS, _ENDS), around, strict=True)
        if taken := own.keys() & variables.keys():
            raise ChatError(f"chat_template_kwargs cannot set {min(taken)}")
        own |= {"tools": None, "documents": None}
        try:
            return self._template.render({**own, **variables})
        except Exception as error:  # a template is a program: it may fail in any way
            raise ChatError(f"the chat template refuses these messages: {error}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training."""

    tags = {"generation"}  # noqa: RUF012 (so declared by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (
            nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)
            for name in (_BEGINS, _ENDS)
        )
        return [begins, *body, ends]


def template_of(folder: Path, vocabulary: Vocabulary, file: Path | None) -> ChatTemplate | None:
    """The template in `file`, or that of a model's folder; None if it has none.

    Models of bytes have a plain one. Raises ChatError for files that cannot be read.
    """
    config: dict[str, Any] = {}
    if (folder / CONFIG).is_file():
        try:
            config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ChatError(f"cannot read {folder / CONFIG}: {error}") from None
    path = file or folder / TEMPLATE
    if file is not None or path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), _special_tokens(config))
        except (OSError, ValueError) as error:
            raise ChatError(f"cannot read the chat template {path}: {error}") from None
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if isinstance(source, str):
        return ChatTemplate(source, _special_tokens(config))
    return ChatTemplate(PLAIN, {}, PLAIN_STOPS) if isinstance(vocabulary, ByteVocabulary) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like: strings, or objects with their content."""
    found = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: value for name, value in found.items() if isinstance(value, str)}


class Chat:
    """Encodes messages so that special tokens come from the template, never from a message.

    In what is rendered, marks tell where contents begin and end and where a content has the text
    of a special token. Without such text the tokens are those of the whole rendering.
    """

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self.stops = template.stops
        self._template = template
        self._vocabulary = vocabulary
        self._guarded = frozenset[int]()
        if isinstance(vocabulary, LearnedVocabulary):
            added = json.loads(vocabulary.data).get("added_tokens") or []
            # Runs of spaces are text like any other.
            guarded = [one for one in added if one["content"].strip()]
            self._guarded = frozenset(one["id"] for one in guarded)
            self._full = vocabulary.tokenizer
            self._plain = _without_tokens(vocabulary.data, self._guarded)

    def prompt(
        self,
        messages: Sequence[Message],
        answer: bool = True,
        resume: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens; `resume` leaves the last message open, to be continued. Raises ChatError."""
        _, tokens = self._tokens(messages, answer, resume, dict(variables or {}))
        return [id for _, _, id in tokens]

    def answers(self, messages: Sequence[Message]) -> list[tuple[int, bool]]:
        """The tokens of a whole conversation, each with whether the assistant says it.

        By `{% generation %}`, where the template has it. Else an answer begins where the prompt for
        it ends, and ends with its message, but for spaces after the mark of its end.
        Raises ChatError, also where the template shows earlier answers in another way than later
        ones and does not mark them.
        """
        text, tokens = self._tokens(messages, False, False, {})
        by_marks = self._template.marks_answers
        find = self._marked_answers if by_marks else self._answers_after_prompts
        ranges = find(messages, text)
        said = [False] * len(text)
        for begin, end in ranges:
            said[begin:end] = [True] * (end - begin)
        return [(id, any(said[start : max(end, start + 1)])) for start, end, id in tokens]

    def _marked_answers(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """Where in the rendering the answers are that the template marks."""
        marks = _marks_for(messages, {})
        marked = self._template.render(messages, False, {}, (marks.border, marks.content))
        if marks.removed(marked) != text:
            raise ChatError(
                "the chat template changes with what a message holds: answers have no place in it"
            )
        places = [i for i, one in enumerate(marked) if one in (marks.border, marks.content)]
        at = [place - count for count, place in enumerate(places)]
        yield from zip(at[::2], at[1::2], strict=True)

    def _answers_after_prompts(
        self, messages: Sequence[Message], text: str
    ) -> Iterator[tuple[int, int]]:
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template.render(messages[:i], True, {})
            whole = self._template.render(messages[: i + 1], False, {})
            if not (text.startswith(whole) and whole.startswith(before)):
                raise ChatError(
                    f"the chat template does not show message {i + 1} as the prompt before it asks "
                    f"for it: mark answers in it by {{% generation %}}"
                )
            yield len(before), max(len(whole.rstrip()), len(before))

    def _tokens(
        self,
        messages: Sequence[Message],
        answer: bool,
        resume: bool,
        values: dict[str, Any],
    ) -> tuple[str, list[Span]]:
        """What is rendered, and its tokens."""
        marks = _marks_for(messages, values)
        exact = self._rendered(messages, answer, resume, values, marks, None)
        if not self._guarded:
            return exact, self._spans(exact)
        for place in ("before", "inside"):
            # Templates may look into contents: marks that change what they find are not used.
            marked = self._rendered(messages, answer, resume, values, marks, place)
            if marks.removed(marked) == exact:
                break
        return marks.removed(marked), self._encode(marked, marks)

    def _spans(self, text: str) -> list[Span]:
        if not isinstance(self._vocabulary, LearnedVocabulary):
            pairs = ((i, id) for i, one in enumerate(text) for id in self._vocabulary.encode(one))
            return [(i, i + 1, id) for i, id in pairs]
        return _spans(self._full, text)

    def _rendered(
        self,
        messages: Sequence[Message],
        answer: bool,
        resume: bool,
        variables: Mapping[str, Any],
        marks: _Marks,
        place: Literal["before", "inside"] | None,
    ) -> str:
        shown = [dict(message) for message in messages]
        values = dict(variables)
        if place is not None:
            for message in shown:
                for key, text in message.items():
                    message[key] = self._marked(text, marks, place)
                message["content"] = marks.bordered(message["content"])
            for key, value in values.items():
                values[key] = self._marked(value, marks, place) if isinstance(value, str) else value
        if not resume:
            return self._template.render(shown, answer, values)
        # The end of the content is where the text is cut, with the spaces that a template strips.
        shown[-1]["content"] += marks.end + " "
        text = self._template.render(shown, False, values)
        kept, found, rest = text.rpartition(marks.end)
        if not found:
            raise ChatError("the chat template does not show the last message to be continued")
        return kept if rest.startswith(" ") else kept.rstrip()

    def _marked(self, text: str, marks: _Marks, place: Literal["before", "inside"]) -> str:
        """The text with a mark at each special token that it would be encoded to."""
        parts, at = [], 0
        for start, end, _ in self._special(text):
            if place == "before" or end - start < 2:
                parts += [text[at:start], marks.content]
                at = start
            else:
                parts += [text[at : start + 1], marks.border]
                at = start + 1
        return "".join((*parts, text[at:]))

    def _special(self, text: str) -> list[Span]:
        """The special tokens that a text is encoded to."""
        return [span for span in _spans(self._full, text) if span[2] in self._guarded]

    def _encode(self, marked: str, marks: _Marks) -> list[Span]:
        text, borders, contents = marks.split(marked)
        special = self._special(text)
        kept = [
            (start, end, id)
            for start, end, id in special
            # No mark within it, and none that says that it is in a content.
            if start not in contents
            and bisect_right(borders, start) == bisect_right(borders, end - 1)
        ]
        if len(kept) == len(special):
            return _spans(self._full, text)
        found, at = [], 0
        for start, end, id in kept:
            found += [*self._text(text[at:start], at), (start, end, id)]
            at = end
        return found + self._text(text[at:], at)

    def _text(self, text: str, at: int) -> list[Span]:
        """The tokens of a text that begins at `at`, without special ones."""
        spans = [(start + at, end + at, id) for start, end, id in _spans(self._plain, text)]
        if not self._guarded.isdisjoint(id for _, _, id in spans):
            raise ChatError(
                "a message has text that its tokenizer can only encode as a special token"
            )
        return spans


def _spans(tokenizer: Any, text: str) -> list[Span]:
    if not text:
        return []
    try:
        found = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeError):
        raise ChatError("the messages are not valid Unicode") from None
    return [(start, end, id) for (start, end), id in zip(found.offsets, found.ids, strict=True)]


class _Marks:
    """Three characters that the messages do not have."""

    def __init__(self, border: str, content: str, end: str) -> None:
        self.border, self.content, self.end = border, content, end

    def bordered(self, text: str) -> str:
        """Marks begin and end of a content, inside the spaces that templates strip."""
        bare = text.strip()
        start = len(text) - len(text.lstrip())
        end = start + len(bare)
        return f"{text[:start]}{self.border}{bare}{self.border}{text[end:]}" if bare else text

    def removed(self, text: str) -> str:
        return text.replace(self.border, "").replace(self.content, "")

    def split(self, marked: str) -> tuple[str, list[int], Collection[int]]:
        """The text without marks; the places in it of borders, and of special text of contents."""
        borders, contents, at = [], set(), 0
        for character in marked:
            if character == self.border:
                borders.append(at)
            elif character == self.content:
                contents.add(at)
            else:
                at += 1
        return self.removed(marked), borders, contents


def _marks_for(messages: Sequence[Message], variables: Mapping[str, Any]) -> _Marks:
    text = " ".join(_texts([*messages, variables]))
    free = [one for one in _NONCHARACTERS if one not in text]
    if len(free) < 3:
        raise ChatError("the messages hold too many Unicode noncharacters")
    return _Marks(*free[:3])


def _texts(values: Iterable[Mapping[str, Any]]) -> list[str]:
    return [text for one in values for text in one.values() if isinstance(text, str)]


def _without_tokens(data: bytes, ids: Collection[int]) -> Any:
    """The tokenizer without these added tokens: their text is like any other."""
    content = json.loads(data)
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] not in ids]
    return load_tokenizer(json.dumps(content).encode())
