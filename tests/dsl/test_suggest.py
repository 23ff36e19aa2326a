"""The nearest known name."""

import pytest

from dsl.suggest import ABSENT, SYNONYMS, did_you_mean, nearest, synonym

NAMES = ["hidden_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "topk_group"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("n_routed_expert", "n_routed_experts"),
        ("hiden_size", "hidden_size"),
        ("HiddenSize", "hidden_size"),
        ("hidden-size", "hidden_size"),
        ("num_experts", "n_routed_experts"),
        ("top_k", "num_experts_per_tok"),
        ("topk", "num_experts_per_tok"),
        ("d_model", "hidden_size"),
        ("groups_active", "topk_group"),
        ("schedule", None),
        ("D_Model", "hidden_size"),
        ("", None),
    ],
)
def test_nearest(name: str, meant: str | None) -> None:
    assert nearest(name, NAMES) == meant


def test_a_synonym_is_offered_only_where_the_name_is_known() -> None:
    assert nearest("top_k", ["vocab_size"]) is None


def test_a_synonym_is_told_from_a_name_that_is_only_near() -> None:
    assert synonym("top-k", NAMES) == "num_experts_per_tok"
    assert synonym("hiden_size", NAMES) is None and synonym("hidden_size", NAMES) is None


def test_names_of_what_is_not_there_are_no_synonyms() -> None:
    assert not ABSENT.keys() & {*SYNONYMS, *(n for names in SYNONYMS.values() for n in names)}


def test_help_line() -> None:
    assert did_you_mean("hiddn_size", NAMES) == "did you mean `hidden_size`?"
    assert did_you_mean("zzz", NAMES) == ""


def test_no_synonym_means_two_things() -> None:
    others = [name for synonyms in SYNONYMS.values() for name in synonyms]
    assert len(others) == len(set(others))
    assert not set(others) & set(SYNONYMS)
