"""Text to tokens in a folder, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.train.documents import FillInTheMiddle, documents, encode
from runtime.train.settings import TrainError
from runtime.train.tokenizer import Bytes, Learned, learn, of_folder, open_tokenizer
from runtime.train.tokens import Tokens, write

FIM = FillInTheMiddle(rate=0.5, begin=256, hole=257, end=258)
TEXTS = ["To be, or not to be: that is the question.", "Größe 🙂", "", "x"]


def test_files_are_documents(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(TEXTS[0], encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS[1:]) + "\n\n")
    assert list(documents([text, lines])) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1"),
        ("a.jsonl", b'{"text": "a", "messages": []}\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"messages": []}\n', r"a\.jsonl:3 .* no list of messages"),
        ("a.jsonl", b'{"messages": ["a"]}\n', r'a\.jsonl:1: message 1 has no "role" and "content"'),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]}',
            r"a\.jsonl:1: the content of message 2 is no text",
        ),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            r"a\.jsonl:1 has no message of the assistant",
        ),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1"),
        ("a.txt", b"abc\xff", "not UTF-8 text: byte 3"),
        ("a.txt", None, "cannot read .*a.txt: No such file"),
    ],
)
def test_files_that_are_no_documents(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=message):
        list(documents([tmp_path / name]))


def test_a_device_has_no_end() -> None:
    with pytest.raises(TrainError, match="/dev/zero is a device, not a file of text"):
        list(documents([Path("/dev/zero")]))


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    tokens = Bytes().encode(text.encode(errors="ignore").decode())
    assert Bytes().decode(tokens) == text.encode(errors="ignore").decode()


def test_a_learned_tokenizer_comes_back(tmp_path: Path) -> None:
    data = learn(TEXTS, vocab_size=300, special=["<eos>"])
    (tmp_path / "t.json").write_bytes(data)
    tokenizer = open_tokenizer(str(tmp_path / "t.json"))
    assert isinstance(tokenizer, Learned)
    assert tokenizer.vocab_size <= 300
    for text in [*TEXTS, "never seen: ß€"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    # A document cannot end itself.
    assert 0 not in tokenizer.encode("a<eos>b")
    assert tokenizer.decode(tokenizer.encode("a<eos>b")) == "a<eos>b"
    with pytest.raises(TrainError, match="not a file of the `tokenizers` library"):
        (tmp_path / "broken.json").write_text("{")
        open_tokenizer(str(tmp_path / "broken.json"))


@given(st.text(max_size=30).map(lambda t: t.encode(errors="ignore").decode()), st.integers(0, 30))
def test_a_filled_in_middle_is_the_same_text_in_another_order(text: str, key: int) -> None:
    tokens = FIM.apply(text, Bytes(), str(key))
    if FIM.begin not in tokens:
        assert tokens == Bytes().encode(text)
        return
    assert tokens[0] == FIM.begin
    hole, end = tokens.index(FIM.hole), tokens.index(FIM.end)
    prefix, suffix, middle = tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 :]
    assert bytes(prefix + middle + suffix).decode() == text


def test_the_rate_of_fill_in_the_middle_holds() -> None:
    found = encode(["some text"] * 2000, Bytes(), eos=None, fim=FIM, seed=1)
    share = sum(tokens[0] == FIM.begin for tokens in found) / 2000
    assert 0.45 < share < 0.55


def made(folder: Path, texts: list[str] = TEXTS, vocab_size: int = 512, **sizes: int) -> Tokens:
    write(folder, encode(texts, Bytes(), eos=300), Bytes(), vocab_size, {"eos": 300}, **sizes)
    return Tokens(folder)


@pytest.mark.parametrize("vocab_size", [512, 100_000])
def test_tokens_are_read_as_they_were_written(tmp_path: Path, vocab_size: int) -> None:
    tokens = made(tmp_path / "t", vocab_size=vocab_size, max_file_tokens=20)
    expected = [t for text in TEXTS for t in [*text.encode(), 300]]
    assert torch.cat([p.to(torch.int64) for p in tokens.parts]).tolist() == expected
    assert len(tokens.parts) > 1
    assert isinstance(of_folder(tmp_path / "t"), Bytes)
    tokens.verify()


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    made(tmp_path / "t")
    with pytest.raises(TrainError, match="exists"):
        made(tmp_path / "t")
    with pytest.raises(TrainError, match="token 300 exceeds"):
        made(tmp_path / "u", vocab_size=256)
    with pytest.raises(TrainError, match="no text"):
        write(tmp_path / "v", [[], []], Bytes(), 256, {})


def test_folders_that_are_damaged(tmp_path: Path) -> None:
    tokens = made(tmp_path / "t")
    file = tmp_path / "t" / "tokens-00000.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-2] + b"zz")
    with pytest.raises(TrainError, match="damaged"):
        Tokens(tmp_path / "t").verify()
    file.write_bytes(data[:-1])
    with pytest.raises(TrainError, match=r"tokens, as tokens\.json says"):
        Tokens(tmp_path / "t")
    (tmp_path / "t" / "tokens.json").write_text("{}")
    with pytest.raises(TrainError, match="holds no tokens"):
        Tokens(tokens.folder)
    with pytest.raises(TrainError, match="holds no tokens"):
        Tokens(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n{"text": "\xc3\xa9"}\n')
    assert list(documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["one", "two", "\u00e9"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    """JSON can write one; no encoding can."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a\\ud83db"}\n{"text": "\\ude00"}\n{"text": "\\ud83d\\ude00"}\n', encoding="utf-8"
    )
    found = list(documents([tmp_path / "a.jsonl"]))
    assert found == ["a\ufffdb", "\ufffd", "\U0001f600"]
    assert all(text.encode() for text in found)
