"""Masks of attention as text, as Python over tensors, and as a function: all say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.ops.base import TypeMismatch
from compiler.ops.mask import as_function, as_python, blind_query, parse, written

NUMBERS = st.recursive(
    st.sampled_from(["q", "k", "0", "1", "3", "7"]),
    lambda part: st.one_of(
        st.tuples(part, st.sampled_from("+-"), part).map(" ".join),
        st.tuples(part, st.sampled_from(["*", "//", "%"]), st.sampled_from("125")).map(
            lambda t: f"({t[0]}) {t[1]} {t[2]}"
        ),
        part.map("-({})".format),
    ),
    max_leaves=4,
)
MASKS = st.recursive(
    st.tuples(NUMBERS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), NUMBERS)
    .map(" ".join)
    .filter(lambda text: "q" in text or "k" in text),
    lambda part: st.one_of(
        st.tuples(part, st.sampled_from(["and", "or"]), part).map(" ".join),
        st.tuples(part, st.sampled_from(["and", "or"]), part).map(lambda t: f"({' '.join(t)})"),
        part.map("not ({})".format),
    ),
    max_leaves=5,
)
PLACE = torch.arange(9)


@given(MASKS)
@settings(max_examples=40)
def test_all_forms_say_the_same(text: str) -> None:
    node = parse(text)
    holds = as_function(node)
    expected = torch.tensor([[bool(holds(q, k)) for k in range(9)] for q in range(9)])
    assert [
        [bool(eval(text, {"q": q, "k": k})) for k in range(9)] for q in range(9)
    ] == expected.tolist()
    query, key = PLACE.unsqueeze(1), PLACE
    found = eval(as_python(node), {"q": query, "k": key})
    assert torch.equal(torch.as_tensor(found).expand(9, 9), expected)
    again = parse(written(node))
    assert written(again) == written(node) and as_python(again) == as_python(node)
    blind = [q for q in range(9) if not holds(q, q)]
    assert blind_query(node, 9) == (blind[0] if blind else None)


@pytest.mark.parametrize(
    "text",
    ["", "q -", "1 < 2", "not 2 < 1", "q < k < 3", "x < 3", "q + k", "q and k < 1", "f(q) < 3",
     "q < 1.5", "q / 2 < k", "q % 0 == k", "q // k == 0", "q * k < 4", "q ** 2 < k",
     "not q", "q < 'a'", "q < true", "(k < 3) + 1 < 2",
     "q * 4_611_686_018_427_387_904 < k", "q == k; 1", "__import__('os')"],
)  # fmt: skip
def test_what_is_no_mask_is_refused(text: str) -> None:
    with pytest.raises(TypeMismatch):
        parse(text)


def test_windows_are_known_to_see_themselves_without_trying() -> None:
    huge = 2**60
    for text in ("q - k < 3", "k + 2 > q", "k < 4 or q // 64 == k // 64", "not q < 9 or q == k"):
        assert blind_query(parse(text), huge) is None
    assert blind_query(parse("k < 4"), huge) == 4
    assert blind_query(parse("q - k > 0 and k < 1"), huge) == 0
