"""Small tokenizers of the kinds that published models have."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from runtime.serve.text import LearnedVocabulary
from runtime.train.tokenizer import learn

MARKS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header|>", "<|end_header|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
PLAIN_MARKS = (
    "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>",
    "<\uff5cend▁of▁sentence\uff5c>",
    "<think>",
    "</think>",
)
"""Added tokens that are not special by their own account, as DeepSeek-V3's are."""
TEMPLATES = Path(__file__).parent / "chat_templates"


@cache
def byte_level() -> bytes:
    """Byte-level BPE with marks of all templates; `encode` can add a BOS."""
    texts = [
        "the quick brown fox jumps over the lazy dog. user assistant system model Größe 🙂 東京"
    ]
    content = json.loads(learn(texts * 3, 340, list(MARKS)))
    first = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": first + i, "content": text, "special": False}
        for i, text in enumerate(PLAIN_MARKS)
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    return json.dumps(content).encode()


@cache
def byte_fallback() -> bytes:
    """BPE of characters with spaces as `▁` and a token for each byte, as SentencePiece makes it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyz.,é", "▁t", "he", "▁the"]
    return _file(
        model={
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"]],
            "byte_fallback": True,
            "unk_token": "<unk>",
            "fuse_unk": True,
        },
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        added=[(1, "<s>"), (2, "</s>")],
    )


@cache
def word_pieces() -> bytes:
    """Words and their continuations: its decoder puts spaces between words."""
    tokens = [
        "[UNK]",
        "[SEP]",
        "the",
        "fox",
        "jump",
        "##s",
        "##ed",
        "over",
        "über",
        ".",
        "un",
        "##do",
    ]
    return _file(
        model={
            "type": "WordPiece",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": False},
        added=[(1, "[SEP]")],
    )


def _file(added: list[tuple[int, str]], **parts: Any) -> bytes:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": c, **flags, "special": True} for i, c in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **parts,
    }
    return json.dumps(content).encode()


def vocabulary() -> LearnedVocabulary:
    return LearnedVocabulary(byte_level())
