"""Files to sources: any path gives text or a diagnostic."""

from __future__ import annotations

import os
from pathlib import Path

from dsl.diagnostic import Diagnostic, DiagnosticError
from dsl.source import MAX_SOURCE_BYTES, Source, Span


def read_source(path: Path, name: str, at: Span | None = None) -> Source:
    """The text of `path`. `name` is what messages print, `at` the place that asked for the file.

    Raises `DiagnosticError`: E100 where there is no readable file, E101 where it is not UTF-8
    text, E102 where it is larger than `MAX_SOURCE_BYTES`.
    """
    label = "named here" if at else ""
    try:
        # Only regular files: reading a pipe or a device might never end.
        if path.is_dir():
            problem = f"{name} is a folder, not a file"
        elif path.exists() and not path.is_file():
            problem = f"{name} is not a regular file"
        else:
            with path.open("rb") as file:
                data = file.read(MAX_SOURCE_BYTES + 1)
            return _decode(data, path, name, at)
    except (OSError, ValueError) as error:
        # ValueError: a NUL character in the path.
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        problem = f"cannot read {name}: {reason}"
    raise DiagnosticError([Diagnostic("E100", problem, at, label)])


def _decode(data: bytes, path: Path, name: str, at: Span | None) -> Source:
    label = "named here" if at else ""
    if len(data) > MAX_SOURCE_BYTES:
        problem = f"{name} is larger than {MAX_SOURCE_BYTES} bytes"
        raise DiagnosticError([Diagnostic("E102", problem, at, label)])
    try:
        # `-sig` drops the mark with which some editors begin a file.
        return Source(name, data.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"{name} is not UTF-8 text: line {line} holds the byte 0x{data[error.start]:02x}"
        help = "save it as UTF-8"
        raise DiagnosticError([Diagnostic("E101", problem, at, label, help=help)]) from None
