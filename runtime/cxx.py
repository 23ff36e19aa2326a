"""C++ of a build, compiled at first use for this CPU, and stored next to its source."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    # The compiler joins no product with a sum by itself: bits follow from the source alone.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
)


class NotCompiled(Exception):
    """Why there is no compiled code, in one line."""


def compiled(source: Path, definitions: Mapping[str, str]) -> ctypes.CDLL:
    """The library made of a source and the headers in its folder, with macros defined.

    It is compiled if there is none of these texts, flags, this compiler and this CPU yet. Raises
    `NotCompiled`.
    """
    command = [*_compiler(), *FLAGS, *(f"-D{name}={text}" for name, text in definitions.items())]
    key = _key(command, source)
    name = f"{source.stem}-{key}.so"
    folders = _folders(source)
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return ctypes.CDLL(str(found or _compile(command, source, folders, name)))


def identity(source: Path) -> str:
    """A hash of a source, the headers in its folder, the compiler and this CPU; else why not."""
    try:
        return _key([*_compiler(), *FLAGS], source)
    except NotCompiled as reason:
        return str(reason)


def _compiler() -> list[str]:
    """CXX, or the first compiler on the path."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        if shutil.which(given[0]) is None:
            raise NotCompiled(f"there is no compiler {given[0]} (CXX)")
        return given
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise NotCompiled("there is no C++ compiler (c++, g++, clang++, or CXX)")
    return [found]


def _key(command: list[str], source: Path) -> str:
    """A hash of the texts, the flags, and what the compiler says of itself and this CPU."""
    macros = _macros(tuple(command))
    digest = hashlib.sha256(repr(command[1:]).encode())
    for text in (
        macros.encode(),
        *(_text(p) for p in (source, *sorted(source.parent.glob("*.h")))),
    ):
        digest.update(hashlib.sha256(text).digest())
    return digest.hexdigest()[:20]


@cache
def _macros(command: tuple[str, ...]) -> str:
    return _run([*command, "-dM", "-E", "-x", "c++", os.devnull], "cannot be asked")


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotCompiled(f"{path} cannot be read: {error.strerror or error}") from None


def _folders(source: Path) -> list[Path]:
    """Where compiled code may lie: next to its source, or in the cache of the user."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [source.parent / "__pycache__", Path(home) / "dslc"]


def _compile(command: list[str], source: Path, folders: list[Path], name: str) -> Path:
    """Compiles into the first folder that can be written to; half a file is never seen."""
    print(f"{source.parent.parent.name}: compiling its step for this CPU, once", file=sys.stderr)
    reason = ""
    for folder in folders:
        beside = folder / f".{name}.{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            beside.touch()
        except OSError as error:
            reason = reason or f"{folder} cannot be written to: {error.strerror or error}"
            continue
        try:
            _run([*command, str(source), "-o", str(beside)], "failed")
            os.replace(beside, folder / name)
        finally:
            beside.unlink(missing_ok=True)
        return folder / name
    raise NotCompiled(reason)


def _run(command: list[str], failing: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise NotCompiled(f"{command[0]} {failing}: {error.strerror or error}") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise NotCompiled(f"{command[0]} {failing}: {first.strip() or done.returncode}")
    return done.stdout
