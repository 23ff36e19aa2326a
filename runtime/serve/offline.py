"""Texts without a server: what `dslc generate` does with a built model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model import LanguageModel
from ..train.command import open_run, weights_in
from ..train.settings import TrainError
from ..train.tokenizer import Tokenizer, of_folder
from .chat import Chat, ChatError, Message, template_of
from .choice import Choice, choice_seed
from .command import end_tokens, make_engine
from .engine import Engine
from .options import Options
from .request import Sampling
from .text import StopStrings, Vocabulary, vocabulary_of

AT_ONCE = 64
"""Prompts that are computed together, at most."""

Show = Callable[[int, str], None]
"""Called with the number of a prompt and the text that came."""


@dataclass(frozen=True)
class Asked:
    """Prompts, each a text or the messages of a chat, and how they are continued."""

    prompts: Sequence[str | Sequence[Message]]
    new_tokens: int
    sampling: Mapping[str, Any]
    """Further fields of `Sampling`, without `seed`."""
    seed: int = 0
    """Of the first prompt; those of others follow from it."""
    stops: tuple[str, ...] = ()
    """Strings that end an answer before them."""
    device: str | None = None
    speculate: int = 0
    chat_template: Path | None = None
    weights: str | None = None
    """The form of quantized weights, if they shall have one."""


def generate_run(
    model: type[LanguageModel], run: Path, asked: Asked, average: bool, show: Show
) -> list[Choice]:
    """Answers by the newest checkpoint of a run, or its moving average. Raises TrainError."""
    _, tokens, checkpoint = open_run(run)
    return generate(model, weights_in(checkpoint, average), asked, show, tokens.tokenizer)


def generate(
    model: type[LanguageModel],
    folder: Path,
    asked: Asked,
    show: Show,
    tokenizer: Tokenizer | None = None,
) -> list[Choice]:
    """The answers, in the order of the prompts, by the weights in a folder.

    `show` gets their texts as they come. Raises TrainError for prompts, settings and weights that
    do not fit.
    """
    if not asked.prompts:
        raise TrainError("there is no prompt")
    try:
        vocabulary = vocabulary_of(tokenizer or of_folder(folder))
        chat = _chat(folder, vocabulary, asked)
        choices = [
            _choice(i, prompt, asked, vocabulary, chat, end_tokens(model, folder))
            for i, prompt in enumerate(asked.prompts)
        ]
        longest = max(len(choice.prompt) + asked.new_tokens for choice in choices)
        limit = model.config.sequence.max_position_embeddings
        options = Options(
            max_model_len=min(longest, limit),  # beyond it, `add` says what fits
            max_requests=min(len(choices), AT_ONCE),
            speculate=asked.speculate,
        )
        engine = make_engine(model, folder, asked.device, options, vocabulary, asked.weights)
        for choice in choices:
            engine.add(choice.id, choice.prompt, choice.sampling)
    except (ChatError, ValueError) as error:
        raise TrainError(str(error)) from None
    _run(engine, choices, show)
    return choices


def _chat(folder: Path, vocabulary: Vocabulary, asked: Asked) -> Chat | None:
    if all(isinstance(prompt, str) for prompt in asked.prompts):
        return None
    template = template_of(folder, vocabulary, asked.chat_template)
    if template is None:
        raise TrainError(f"{folder} has no chat template: give one with --chat-template FILE")
    return Chat(template, vocabulary)


def _choice(
    index: int,
    prompt: str | Sequence[Message],
    asked: Asked,
    vocabulary: Vocabulary,
    chat: Chat | None,
    ends: frozenset[int],
) -> Choice:
    stops = asked.stops
    if isinstance(prompt, str):
        ids = vocabulary.encode(prompt, add_special=True)
        if not ids:
            raise TrainError("give a prompt of at least one token")
    else:
        assert chat is not None
        ids, stops = chat.prompt(prompt), (*stops, *chat.stops)
    sampling = Sampling(
        asked.new_tokens, seed=choice_seed(asked.seed, index), end_tokens=ends, **asked.sampling
    )
    stop, hidden = StopStrings(stops), vocabulary.special
    return Choice(index, str(index), ids, sampling, vocabulary, stop, hidden)


def _run(engine: Engine, choices: Sequence[Choice], show: Show) -> None:
    while engine.busy:
        for event in engine.step():
            choice = choices[int(event.id)]
            if choice.finish is not None:  # by a stop string
                continue
            delta = choice.feed(event)
            show(choice.index, delta.text)
            if delta.finish is not None and event.finish is None:
                engine.abort(event.id)
