"""Files are replaced whole or not at all."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.files import replace_text


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file can grow beyond 100 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("no_room")
def test_without_room_the_old_file_stays_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    replace_text(path, "old")
    with pytest.raises(OSError, match=r"page\.html") as caught:
        replace_text(path, "new" * 100)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
