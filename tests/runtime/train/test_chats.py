"""Chats as data: the loss counts what the assistant says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.functional import IGNORED_LABEL
from runtime.serve.chat import Chat, ChatError, ChatTemplate
from runtime.train.documents import documents, encode
from runtime.train.prepare import chats_of
from runtime.train.sequences import Sequences, ValidationSet, inputs_and_labels, split
from runtime.train.settings import TrainError
from runtime.train.tokenizer import Bytes, Learned
from runtime.train.tokens import Masked, Tokens, write
from tests.support.tokenizers import TEMPLATES, byte_level, vocabulary
from tests.support.trained import built, part

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MARKED = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}
{%- endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
CHATS: list[list[dict[str, str]]] = [
    [
        {"role": "user", "content": "the quick fox 🙂"},
        {"role": "assistant", "content": "jumps over  the dog 東京"},
    ],
    [
        {"role": "system", "content": "Größe"},
        {"role": "user", "content": "  a\nb "},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "the <|im_end|> lazy\n"},
    ],
]


def file_of(folder: Path, rows: list[Any], name: str = "chats.jsonl") -> Path:
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.slow
def test_what_a_template_marks_is_what_transformers_finds() -> None:
    from transformers import PreTrainedTokenizerFast

    level = vocabulary()
    peer = PreTrainedTokenizerFast(tokenizer_object=level.tokenizer, **SPECIAL)
    chat = Chat(ChatTemplate(MARKED, SPECIAL), level)
    for messages in [CHATS[0], CHATS[1][:3]]:  # others do not guard special tokens
        found = peer.apply_chat_template(
            messages, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
        )
        tokens = chat.answers(messages)
        assert [token for token, _ in tokens] == found["input_ids"] == chat.prompt(messages, False)
        assert [int(said) for _, said in tokens] == found["assistant_masks"]
        assert 0 < sum(found["assistant_masks"]) < len(tokens)


def said_by(chat: Chat, messages: list[dict[str, str]]) -> list[str]:
    """The texts of the runs of tokens that are trained on."""
    runs: list[list[int]] = []
    before = False
    for token, said in chat.answers(messages):
        if said and not before:
            runs.append([])
        if said:
            runs[-1].append(token)
        before = said
    return [vocabulary().decode(run) for run in runs]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("headers", "<|eot|>"),
        ("deepseek", "<\uff5cend▁of▁sentence\uff5c>"),
        ("turns", "<end_of_turn>"),
        ("instruct", "</s>"),
    ],
)
def test_an_answer_is_what_follows_the_prompt_for_it(name: str, end: str) -> None:
    """With the token that ends it, at which a server stops."""
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    chat = Chat(ChatTemplate(source, SPECIAL), vocabulary())
    found = said_by(chat, CHATS[0])
    assert [text.strip() for text in found] == [f"jumps over  the dog 東京{end}"]
    several = said_by(chat, [*CHATS[0], *CHATS[1][1:3]])
    assert len(several) == 2 and several[1].strip() == f"one{end}"


def test_text_of_a_special_token_ends_no_answer() -> None:
    for source in (MARKED, (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")):
        chat = Chat(ChatTemplate(source, SPECIAL), vocabulary())
        assert said_by(chat, CHATS[1]) == ["one<|im_end|>", "the <|im_end|> lazy\n<|im_end|>"]
        end = vocabulary().tokenizer.token_to_id("<|im_end|>")
        assert sum(token == end for token, _ in chat.answers(CHATS[1])) == len(CHATS[1])


def test_an_answer_that_a_template_cuts_later_is_refused() -> None:
    source = (TEMPLATES / "deepseek.jinja").read_text(encoding="utf-8")
    chat = Chat(ChatTemplate(source + "{{ messages | length }}", SPECIAL), vocabulary())
    with pytest.raises(ChatError, match="message 2 as the prompt before it"):
        chat.answers([*CHATS[0], *CHATS[1][1:3]])


def test_bytes_have_a_plain_template() -> None:
    chats = chats_of(Bytes(), "bytes", None)
    found = chats([{"role": "user", "content": "a"}, {"role": "assistant", "content": "ß"}])
    assert bytes(token for token, _ in found).decode() == "User: a\nAssistant: ß\n"
    assert bytes(token for token, said in found if said).decode() == " ß\n"


def test_files_become_tokens_with_masks(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "the fox"}, {"messages": CHATS[0]}, {"messages": CHATS[1]}]
    (tmp_path / "tokenizer.json").write_bytes(byte_level())
    (tmp_path / "chat_template.jinja").write_text(MARKED, encoding="utf-8")
    tokenizer = Learned(tmp_path / "tokenizer.json")
    chats = chats_of(tokenizer, str(tmp_path / "tokenizer.json"), None)
    file = file_of(tmp_path, rows)
    made = list(encode(documents([file]), tokenizer, 1, chats=chats))
    header = write(tmp_path / "data", made, tokenizer, 400, {}, max_file_tokens=60)
    assert [bool(one.mask) for one in header.parts] == [True] * len(header.parts)
    tokens = Tokens(tmp_path / "data")
    tokens.verify()
    assert tokens.masked and tokens.header == header
    flat = [token for document in made for token in document]
    assert torch.cat([one.to(torch.int64) for one in tokens.parts]).tolist() == flat
    assert made[0] == [*tokenizer.encode("the fox"), 1] and made[1][-1] == 1  # ends the answer
    (tmp_path / "data" / header.parts[0].mask).write_bytes(b"\1" * header.parts[0].tokens)
    with pytest.raises(TrainError, match=r"mask-00000\.bin is damaged"):
        tokens.verify()


def test_packed_sequences_keep_their_masks() -> None:
    values = [*range(10), *(~i for i in range(10, 25)), *range(25, 40)]
    flat = torch.tensor(values)
    masked = Masked(flat.where(flat >= 0, ~flat).to(torch.uint16), (flat >= 0).to(torch.uint8))
    trained, held_out = split([masked], 0.25)
    sequences = Sequences(trained, 8, seed=1)
    assert sequences.masked and not Sequences([flat.abs()], 8, seed=1).masked
    for found in [
        *(sequences[i] for i in range(6)),
        *map(ValidationSet(held_out, 4).__getitem__, (0, 1)),
    ]:
        inputs, labels = inputs_and_labels(found[None])
        start = int(inputs[0, 0])
        assert inputs[0].tolist() == list(range(start, start + len(found) - 1))
        after = range(start + 1, start + len(found))
        assert labels[0].tolist() == [IGNORED_LABEL if 10 <= t < 25 else t for t in after]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "tool", "content": "a"}, CHATS[0][1]]},
            r"chats\.jsonl:2: the chat",
        ),
        ({"messages": []}, r"chats\.jsonl:2 has"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path) -> None:
    source = (TEMPLATES / "instruct.jinja").read_text(encoding="utf-8")
    (tmp_path / "t.jinja").write_text(source, encoding="utf-8")
    (tmp_path / "t.json").write_bytes(byte_level())
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    tokenizer = Learned(tmp_path / "t.json")
    file = file_of(tmp_path, [{"messages": CHATS[0]}, row])
    beside = str(tmp_path / "config" / "t.json")
    chats = chats_of(tokenizer, beside, tmp_path / "t.jinja")
    with pytest.raises(TrainError, match=message):
        list(encode(documents([file]), tokenizer, chats=chats))
    without = chats_of(tokenizer, str(tmp_path / "t.json"), None)
    with pytest.raises(TrainError, match=r"chats\.jsonl:1: .*give --chat-template"):
        list(encode(documents([file]), tokenizer, chats=without))


def step(package: Any, tokens: Any, size: int) -> Any:
    """What a step over 6 sequences says, `size` of them at a time; and its trainer."""
    trainer = part(package, "trainer")
    settings = part(package, "settings").Settings.of(package.config)
    settings = type(settings)(**{**vars(settings), "micro_batch": size})
    data = part(package, "sequences").Sequences([tokens], 16, 0)
    made = trainer.Trainer(package.Model(dtype=torch.float64, seed=1), settings, data)
    return made.step(), made


@pytest.mark.slow
def test_a_step_counts_every_answer_once(tmp_path: Path) -> None:
    """In any micro-batches: some have many labels, and some none."""
    package = built(tmp_path, "chats_trained", train__loss__balance_alpha="0")
    flat = torch.randint(64, (400,), generator=torch.manual_seed(0))
    said = torch.rand(400, generator=torch.manual_seed(1)) < 0.3
    said[80:240] = False
    masked = part(package, "tokens").Masked(flat.to(torch.uint16), said.to(torch.uint8))
    whole, trainer = step(package, masked, 6)
    tokens = trainer.sequences.batch(range(6))
    counts = [(row[1:] >= 0).sum().item() for row in tokens]
    assert 0 in counts and max(counts) > 3
    one, _ = step(package, masked, 1)
    assert one.main == pytest.approx(whole.main, rel=1e-6)
    assert one.mtp == pytest.approx(whole.mtp, rel=1e-6)
    assert one.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    # By hand: the mean of -log p over what is said.
    logits = package.Model(dtype=torch.float64, seed=1)(tokens.where(tokens >= 0, ~tokens)[:, :-1])
    log_p = logits.logits.log_softmax(-1)
    pairs = [
        -log_p[i, j, token].item()
        for i, row in enumerate(tokens[:, 1:].tolist())
        for j, token in enumerate(row)
        if token >= 0
    ]
    assert whole.main == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)
    evaluation = part(package, "evaluation")
    held_out = part(package, "sequences").ValidationSet([masked], 16)
    found = [evaluation.evaluate(trainer.model, held_out, Bytes(), size) for size in (1, 5)]
    assert found[0].tokens == said[1 : 1 + held_out.count * 16].sum()
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)


@pytest.mark.slow
def test_a_run_trains_on_chats(tmp_path: Path, package: Any) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(40)
    ]
    command = part(package, "command")
    options = command.Options(out=tmp_path / "run", data=(file_of(tmp_path, rows),), device="cpu")
    assert command.train(package.Model, options) == 0
    index = json.loads((tmp_path / "run" / "data" / "tokens.json").read_text())
    assert index["parts"][0]["mask"] == "mask-00000.bin"
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    held = lines[-1]["held_out"]
    assert held["tokens"] > 0 and lines[0]["main"] < 7
    assert command.evaluate(package.Model, tmp_path / "run", average=False).tokens == held["tokens"]
