"""One small model, built once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.trained import built


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return built(tmp_path_factory.mktemp("built"), "tiny_trained")
