"""`dslc generate`: text from a trained or imported model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dslc.commands.eval import AverageOption
from dslc.commands.import_ import SpecOption
from dslc.commands.serve import SourceArgument
from dslc.options import DeviceOption, Format, FormatOption
from runtime.serve.options import MOST_DRAFTS

EXAMPLES = """
\b
Examples:
  dslc generate runs/mini --prompt "ROMEO:"           the newest weights of a run
  dslc generate runs/mini --prompt "ROMEO:" --tokens 200 --temperature 0      greedy decoding
  dslc import DeepSeek-V2-Lite --to lite && dslc generate lite --chat --prompt "Who are you?"
  dslc generate lite --file prompts.jsonl --format json > answers.jsonl
Each line of FILE is {"prompt": "a text"} or {"messages": [{"role": "user", "content": ".."}]}.
"""


def run(
    source: SourceArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to continue; repeatable [a newline].", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="JSON lines, each a prompt or messages.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are messages of a user, by the chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="With --chat, the system message.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of new tokens, at most.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding.")] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Sample from the most likely tokens with this total probability."
        ),
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(min=0, help="Sample from so many of the most likely tokens; 0: all.")
    ] = 0,
    min_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Leave out tokens less likely than this times the first."),
    ] = 0.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends an answer before it; repeatable.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    speculate: Annotated[
        int,
        typer.Option(min=0, max=MOST_DRAFTS, help="Tokens that MTP modules draft for each step."),
    ] = 0,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="A chat template in Jinja [that of the folder].", show_default=False),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FORM",
            help="Hold weights of products quantized: fp8 or int8 [as they are].",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    format: FormatOption = Format.text,
    ema: AverageOption = False,
    spec: SpecOption = None,
) -> None:
    """Continue texts, or answer messages, with a trained or imported model.

    An answer does not depend on the other prompts. Without --chat the prompt is printed before it.
    """
    from dslc.report import reporting
    from dslc.trained import GENERATE, using_source

    with reporting():
        prompts = _prompts(prompt, file, chat, system)
    fields = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    printer = _Printer(prompts, format)
    with using_source(source, spec, GENERATE, weights=weights) as (command, model, _, trained):
        stops = tuple(stop or ())
        asked = command.Asked(
            prompts, tokens, fields, seed, stops, device, speculate, chat_template, weights
        )
        if trained:
            choices = command.generate_run(model, source, asked, ema, printer.show)
        else:
            choices = command.generate(model, source, asked, printer.show)
    printer.end(choices)
    broken = [choice.index for choice in choices if choice.finish == "error"]
    for index in broken:
        print(f"error: prompt {index}: its logits were NaN or infinite", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def _prompts(prompt: list[str] | None, file: Path | None, chat: bool, system: str | None) -> Any:
    """Texts and lists of messages."""
    found: list[Any] = [*_lines(file)] if file else []
    for text in prompt if prompt is not None else [] if file else ["\n"]:
        if not chat:
            found.append(text)
            continue
        messages = [{"role": "user", "content": text}]
        found.append([{"role": "system", "content": system}, *messages] if system else messages)
    return found


def _lines(file: Path) -> Iterator[Any]:
    """Ends the command with a message for a line that is no prompt."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        _refuse(f"{file} is not UTF-8: {error.reason}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _prompt_of(json.loads(line))
            except (ValueError, TypeError) as error:
                _refuse(f"{file}, line {number}: {error}")


def _refuse(reason: str) -> NoReturn:
    wanted = 'each line is {"prompt": ".."} or {"messages": [{"role": .., "content": ..}, ..]}'
    print(f"error: {reason}; {wanted}", file=sys.stderr)
    raise typer.Exit(1)


def _prompt_of(line: Any) -> Any:
    """Raises ValueError and TypeError."""
    if not isinstance(line, dict) or line.keys() not in ({"prompt"}, {"messages"}):
        raise ValueError("it needs `prompt` or `messages`, and nothing else")
    if "prompt" in line:
        if not isinstance(line["prompt"], str):
            raise TypeError("`prompt` must be a text")
        return line["prompt"]
    messages = line["messages"]
    keys = [one.keys() if isinstance(one, dict) else None for one in messages]
    if not messages or any(one != {"role", "content"} for one in keys):
        raise ValueError("each of `messages` needs `role` and `content`")
    if not all(isinstance(value, str) for one in messages for value in one.values()):
        raise TypeError("`role` and `content` must be texts")
    return messages


class _Printer:
    """Text of a single prompt as it comes, of several in their order at the end."""

    def __init__(self, prompts: Any, format: Format) -> None:
        self.prompts, self.format = prompts, format
        self.streams = len(prompts) == 1 and format is Format.text
        self.begun = False

    def show(self, index: int, text: str) -> None:
        if not self.streams:
            return
        if not self.begun and isinstance(self.prompts[0], str):
            text = self.prompts[0] + text
        self.begun = True
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self, choices: Any) -> None:
        if self.streams:
            print()
            return
        for prompt, choice in zip(self.prompts, choices, strict=True):
            text = "".join(choice.text)
            if self.format is Format.json:
                print(json.dumps(_record(prompt, choice, text), ensure_ascii=False))
            else:
                print(f"{prompt if isinstance(prompt, str) else ''}{text}\n")


def _record(prompt: Any, choice: Any, text: str) -> dict[str, Any]:
    return {
        "prompt" if isinstance(prompt, str) else "messages": prompt,
        "text": text,
        "finish_reason": choice.finish,
        "prompt_tokens": len(choice.prompt),
        "completion_tokens": choice.completion_tokens,
        "seed": choice.sampling.seed,
    }
