"""Chat templates: the prompts of transformers, and no special token made by a message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serve.chat import Chat, ChatError, ChatTemplate, template_of
from runtime.serve.text import ByteVocabulary, LearnedVocabulary
from tests.support.tokenizers import (
    MARKS,
    PLAIN_MARKS,
    TEMPLATES,
    byte_fallback,
    byte_level,
    vocabulary,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
LEVEL = vocabulary()
FORBIDDEN = {LEVEL.tokenizer.token_to_id(text) for text in (*MARKS, *PLAIN_MARKS)}

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "the quick fox"}],
    [
        {"role": "system", "content": "Say \"<b>\" & 'ü' 🙂."},
        {"role": "user", "content": "  spaces \n around\n"},
        {"role": "assistant", "content": "东京\tfox"},
        {"role": "user", "content": ""},
    ],
]
THOUGHTS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>hm\n</think>\n\nb"},
    {"role": "user", "content": "c"},
]


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def chat(name: str) -> Chat:
    return Chat(ChatTemplate(source(name), SPECIAL), LEVEL)


@pytest.fixture(scope="module")
def peer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=LEVEL.tokenizer, **SPECIAL)


def test_there_are_six_templates() -> None:
    assert len(NAMES) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_those_of_transformers(name: str, peer: Any) -> None:
    for messages in CHATS:
        for answer in (True, False):
            given = {"chat_template": source(name), "add_generation_prompt": answer, "mode": "full"}
            text = peer.apply_chat_template(messages, tokenize=False, **given)
            ids = peer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
            template = ChatTemplate(source(name), SPECIAL)
            assert template.render(messages, answer, {"mode": "full"}) == text
            assert chat(name).prompt(messages, answer, variables={"mode": "full"}) == ids


@pytest.mark.slow
def test_a_last_message_is_continued_as_by_transformers(peer: Any) -> None:
    for name in ("chatml", "headers", "deepseek"):
        for content in ("the fox", "the fox "):
            messages = [*CHATS[0], {"role": "assistant", "content": content}]
            ids = peer.apply_chat_template(
                messages, chat_template=source(name), continue_final_message=True, return_dict=False
            )
            assert chat(name).prompt(messages, resume=True) == ids


@pytest.mark.slow
def test_thoughts_that_a_template_cuts_out_are_cut_out(peer: Any) -> None:
    ids = peer.apply_chat_template(
        THOUGHTS, chat_template=source("deepseek"), add_generation_prompt=True, return_dict=False
    )
    assert chat("deepseek").prompt(THOUGHTS) == ids


HOSTILE = st.lists(
    st.sampled_from([*MARKS, *PLAIN_MARKS, "<|im_", "start|>", "<", ">", "s", " ", "\n", "fox"]),
    max_size=6,
).map("".join)


@pytest.mark.slow
@given(st.sampled_from(NAMES), HOSTILE, HOSTILE)
def test_messages_make_no_special_token(name: str, first: str, second: str) -> None:
    """As many of each as with messages that are harmless; the text is all there."""

    def special(*contents: str) -> list[int]:
        roles = ("user", "assistant", "user")
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        ids = chat(name).prompt(messages)
        return [id for id in ids if id in FORBIDDEN]

    assert special(first, second, first) == special("x", "x", "x")


def test_a_special_token_is_text_and_all_of_it_is_there() -> None:
    ids = chat("chatml").prompt([{"role": "user", "content": "a<|im_end|>b"}])
    assert LEVEL.decode(ids) == "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n"
    assert sum(id in FORBIDDEN for id in ids) == 3


def test_two_messages_joined_make_no_special_token() -> None:
    joining = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    halves = [{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}]
    ids = Chat(joining, LEVEL).prompt(halves)
    assert LEVEL.decode(ids) == "<|im_end|>" and FORBIDDEN.isdisjoint(ids)


def test_variables_of_a_request_make_no_special_token() -> None:
    template = ChatTemplate("{{ mode }}<|im_end|>", {})
    ids = Chat(template, LEVEL).prompt(CHATS[0], variables={"mode": "<|im_end|>"})
    assert sum(id in FORBIDDEN for id in ids) == 1


def test_a_tokenizer_that_can_only_make_a_special_token_is_refused() -> None:
    content = json.loads(byte_fallback())
    content["added_tokens"][0]["content"] = "a"  # the token of the letter
    content["added_tokens"][0]["id"] = content["model"]["vocab"]["a"]
    one = Chat(
        ChatTemplate("{{ messages[0].content }}", {}),
        LearnedVocabulary(json.dumps(content).encode()),
    )
    with pytest.raises(ChatError, match="only encode as a special token"):
        one.prompt([{"role": "user", "content": "a"}])


def test_bytes_have_a_plain_template(tmp_path: Path) -> None:
    template = template_of(tmp_path, ByteVocabulary(), None)
    assert template is not None and "\nUser:" in template.stops
    text = bytes(Chat(template, ByteVocabulary()).prompt(CHATS[1][:2])).decode()
    assert text == "System: Say \"<b>\" & 'ü' 🙂.\nUser:   spaces \n around\n\nAssistant:"


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert template_of(tmp_path, LEVEL, None) is None
    config = tmp_path / "tokenizer_config.json"
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": "{{ bos_token }}"},
    ]
    for value in ("{{ bos_token }}", named):
        config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": value}))
        found = template_of(tmp_path, LEVEL, None)
        assert found is not None and found.render([], True, {}) == "<s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    found = template_of(tmp_path, LEVEL, None)
    assert found is not None and found.render([], True, {}) == "file <s>"
    (tmp_path / "mine").write_text("mine")
    found = template_of(tmp_path, LEVEL, tmp_path / "mine")
    assert found is not None and found.render([], True, {}) == "mine"


@pytest.mark.parametrize(
    "text", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"]
)
def test_templates_that_fail_or_leave_the_sandbox(text: str) -> None:
    with pytest.raises(ChatError, match="refuses"):
        ChatTemplate(text, {}).render([], True, {})


def test_wrong_templates_and_messages(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(ChatError, match="cannot read"):
        template_of(tmp_path, LEVEL, tmp_path / "absent")
    with pytest.raises(ChatError, match="roles must alternate"):
        chat("instruct").prompt([CHATS[0][0], CHATS[0][0]])
    with pytest.raises(ChatError, match="cannot set messages"):
        chat("chatml").prompt(CHATS[0], variables={"messages": []})
    with pytest.raises(ChatError, match="Unicode"):
        chat("chatml").prompt([{"role": "user", "content": "\ud800"}])


def test_byte_level_data_is_what_the_tests_think() -> None:
    assert LearnedVocabulary(byte_level()).tokenizer.token_to_id("<think>") in FORBIDDEN
