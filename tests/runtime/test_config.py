from __future__ import annotations

import copy
import pickle

import pytest

from runtime.config import Config, Phase, Schedule, freeze

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
    schedule = Schedule((Phase(0.3, until=10), Phase(0.2, until=20), Phase(0.1)))
    tokens = (0, 9, 10, 19, 20, 10**15)
    assert [schedule.value_at(t) for t in tokens] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]
    assert Schedule((Phase(0.5),)).value_at(7) == 0.5


def test_a_phase_with_a_start_moves_to_its_value() -> None:
    schedule = Schedule(
        (
            Phase(4.0, until_step=4, start=0.0),
            Phase(4.0, until=100),
            Phase(2.0, until=200, start=4.0, shape="cosine"),
            Phase(1.0),
        )
    )
    assert [schedule.value_at(0, step) for step in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]
    # Half a cosine: a quarter of the way it has moved by (1 - cos 45 degrees) / 2.
    after = {99: 4.0, 100: 4.0, 125: 4.0 - 2 * 0.14644660940672624, 150: 3.0, 200: 1.0}
    assert {t: schedule.value_at(t, 4) for t in after} == pytest.approx(after)


@pytest.mark.parametrize(
    "phases",
    [
        (),
        (Phase(1.0, until=10),),
        (Phase(1.0), Phase(2.0)),
        (Phase(1.0, until=9), Phase(2.0, until=9), Phase(3.0)),
        (Phase(1.0, until_step=9), Phase(2.0, until_step=8), Phase(3.0)),
    ],
)
def test_phases_that_make_no_schedule_are_refused(phases: tuple[Phase, ...]) -> None:
    with pytest.raises(ValueError, match="phase"):
        Schedule(phases)
