from __future__ import annotations

import copy
import pickle

import pytest

from runtime.config import Config, Schedule, freeze

VALUES = {"params": {"hidden_size": 64, "keys": 3}, "layers": [{"repeat": 3}, {"repeat": 58}]}


def test_values_are_reached_by_attribute_and_by_item() -> None:
    config = freeze(VALUES)
    assert config.params.hidden_size == config["params"]["hidden_size"] == 64
    assert config.layers[1].repeat == 58
    assert list(config) == ["params", "layers"] and len(config) == 2 and "params" in config


def test_a_value_may_have_any_name() -> None:
    assert freeze(VALUES).params.keys == 3


def test_a_config_cannot_be_changed() -> None:
    values = {"a": {"b": [1]}}
    config = freeze(values)
    values["a"]["b"].append(2)
    assert config.a.b == (1,)
    with pytest.raises(AttributeError, match="frozen"):
        config.a.b = 2
    with pytest.raises(AttributeError, match="frozen"):
        del config.a
    with pytest.raises(TypeError):
        config["a"] = 2


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no 'hiden_size'"):
        _ = freeze(VALUES).params.hiden_size


def test_equal_values_make_equal_configs() -> None:
    assert freeze(VALUES) == freeze(VALUES) and hash(freeze(VALUES)) == hash(freeze(VALUES))
    assert freeze(VALUES) != freeze({**VALUES, "layers": []})
    assert freeze({"a": 1}) != {"a": 1}


def test_a_config_prints_and_copies() -> None:
    config = freeze(VALUES)
    assert repr(config.params) == "Config(hidden_size=64, keys=3)"
    assert eval(repr(Config({"a": {"b": 1}})), {"Config": lambda **v: Config(v)}).a.b == 1
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_a_phase_ends_before_its_number_of_tokens() -> None:
    schedule = Schedule(((10, 0.3), (20, 0.2), (None, 0.1)))
    tokens = (0, 9, 10, 19, 20, 10**15)
    assert [schedule.value_at(t) for t in tokens] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]
    assert Schedule(((None, 0.5),)).value_at(7) == 0.5


@pytest.mark.parametrize(
    "phases",
    [(), ((10, 1.0),), ((None, 1.0), (None, 2.0)), ((9, 1.0), (9, 2.0), (None, 3.0))],
)
def test_phases_that_make_no_schedule_are_refused(
    phases: tuple[tuple[int | None, float], ...],
) -> None:
    with pytest.raises(ValueError, match="phase"):
        Schedule(phases)
