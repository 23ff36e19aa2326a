"""Text of tokens as they come equals the text of all; stop strings end it wherever it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.serve.text import (
    ByteVocabulary,
    LearnedVocabulary,
    StopStrings,
    Vocabulary,
    WindowDetokenizer,
    vocabulary_of,
)
from runtime.train.tokenizer import Bytes
from tests.support.tokenizers import byte_fallback, byte_level, word_pieces

BYTES = vocabulary_of(Bytes())
LEVEL, FALLBACK, WORDS = (LearnedVocabulary(f()) for f in (byte_level, byte_fallback, word_pieces))
SIZES = {
    id(v): v.tokenizer.get_vocab_size() + 2  # with ids that have no token
    for v in (LEVEL, FALLBACK, WORDS)
} | {id(BYTES): 260}
VOCABULARIES = st.sampled_from([BYTES, LEVEL, FALLBACK, WORDS])
TEXTS = ["Größe 🙂 東京", "the fox\u0301", "�", "", "👩‍👩‍👧 \r\n\t", "\uff41<s>"]


def deltas(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detokenizer = vocabulary.detokenizer()
    return [*(detokenizer.feed(id) for id in ids), detokenizer.end()]


def joined(vocabulary: Vocabulary, ids: list[int]) -> str:
    """The text of all tokens at once, by their bytes where they have some."""
    pieces = [vocabulary.piece(id) for id in ids]
    if None in pieces:
        return vocabulary.decode(ids)
    return b"".join(piece or b"" for piece in pieces).decode(errors="replace")


@given(VOCABULARIES, st.data())
def test_deltas_joined_are_the_text_of_all_tokens(
    vocabulary: Vocabulary, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, SIZES[id(vocabulary)] - 1), max_size=40))
    assert "".join(deltas(vocabulary, ids)) == joined(vocabulary, ids)


@given(st.lists(st.integers(0, SIZES[id(LEVEL)] - 1), max_size=40))
def test_bytes_of_byte_level_tokens_are_what_the_library_decodes(ids: list[int]) -> None:
    assert joined(LEVEL, ids) == LEVEL.decode(ids)


@given(st.text(max_size=30))
def test_any_text_comes_back(text: str) -> None:
    for vocabulary in (BYTES, LEVEL):
        assert "".join(deltas(vocabulary, vocabulary.encode(text))) == text


@given(st.text("the foxé🙂.", max_size=30))
def test_bytes_of_byte_fallback_are_what_the_library_decodes_but_for_one_space(text: str) -> None:
    ids = FALLBACK.encode(text)
    assert joined(FALLBACK, ids) == text
    assert FALLBACK.decode(ids) == text.removeprefix(" ")


@pytest.mark.parametrize("text", TEXTS)
def test_no_delta_shows_half_a_character(text: str) -> None:
    for vocabulary in (BYTES, LEVEL, FALLBACK):
        found = deltas(vocabulary, vocabulary.encode(text))
        assert "".join(found) == text
        assert "\ufffd" in text or not any("\ufffd" in delta for delta in found)


def test_an_answer_begins_behind_a_prompt_that_ends_within_a_character() -> None:
    smile = BYTES.encode("🙂")
    assert "".join(deltas(BYTES, [*smile[2:], *b"ok"])) == "\ufffd\ufffdok"


def test_a_cut_off_character_is_shown_at_the_end() -> None:
    assert deltas(BYTES, BYTES.encode("a🙂")[:-1]) == ["a", "", "", "", "\ufffd"]


def test_words_are_decoded_in_a_window() -> None:
    assert isinstance(WORDS.detokenizer(), WindowDetokenizer)
    ids = WORDS.encode("the fox jumps undo")
    assert deltas(WORDS, ids) == ["the", " fox", " jump", "s", " un", "do", ""]


def test_special_tokens_are_parsed_and_bos_is_added_where_asked() -> None:
    assert LEVEL.encode("<s>a") == [0, *LEVEL.encode("a")]
    assert LEVEL.encode("a", add_special=True) == LEVEL.encode("<s>a")
    assert isinstance(BYTES, ByteVocabulary) and BYTES.piece(256) == b""


def by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the first place where some stop string is complete."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


CUTS = st.lists(st.text("ab", max_size=5), max_size=8)


@given(CUTS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.booleans())
def test_the_stop_that_is_complete_first_ends_the_text(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    search = StopStrings(stops, include)
    shown = ""
    expected, stop = by_definition("".join(pieces), stops, include)
    for piece in pieces:
        shown += search.feed(piece)
        assert expected.startswith(shown), "what was shown cannot be taken back"
    shown += search.end()
    assert (shown, search.found) == (expected, stop)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_less_than_the_longest_stop_is_held_back(text: str, stops: list[str]) -> None:
    search = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, 1):
        shown += search.feed(character)
        if search.found is None:
            assert end - len(shown) < max(map(len, stops), default=1)


def test_stops_over_tokens_and_several_in_one_step() -> None:
    search = StopStrings(["END", "\n\n"])
    pieces = ("a E", "N", "x\n", "b", "\nEN", "D\n\n")
    assert [search.feed(piece) for piece in pieces] == ["a ", "", "ENx", "\nb", "\n", ""]
    assert search.found == "END" and search.feed("more") == "" == search.end()
