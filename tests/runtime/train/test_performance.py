"""What a line of metrics says of the speed of a step."""

from __future__ import annotations

import pytest
import torch

from runtime.config import Config
from runtime.train.performance import measure
from runtime.train.ranks import ProcessGroups


@pytest.mark.parametrize(("peak", "mfu"), [(2e-6, 0.25), (None, None)])
def test_rates_and_utilization_follow_from_the_build(peak: float | None, mfu: float | None) -> None:
    """64 tokens in half a millisecond, each of which takes a GPU 2 microseconds at peak rates."""
    parallel = Config({"flops_of_token": 1000, "peak_seconds_of_token": peak})
    found = measure(parallel, ProcessGroups(), torch.device("cpu"), 64, 512e-6, 1e-4)
    assert found.tokens_per_second == 125_000
    assert found.flops_per_second == 125_000_000
    assert found.mfu == mfu
    assert found.waited_least == found.waited_most == 1e-4
    assert found.memory_bytes > 10**7
