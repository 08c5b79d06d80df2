"""Write files in one step, and read JSON and TOML that nobody vouches for. Torch-free.

Requirement: a reader never sees half a file, whatever kills the writer, and a JSON file means the
same to every reader: no NaN or Infinity, no key that stands twice. What is read is bounded: a file
never takes memory or time beyond what its size explains.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from tpcheck.errors import TPCheckError
from tpcheck.json_reader import parse_json, require_shallow

MAX_JSON_BYTES = 1 << 30
MAX_TOML_BYTES = 1 << 20
"""Policies, tolerances and shard maps are pages of text; more is another file, or a device."""

_MAX_DOTS = 100
"""In one line of TOML: a key of many parts takes Python's reader time by the square of them."""


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Replace the file at `path` by `text` and a newline in one step.

    Links are followed. What is there and not a file (a pipe, /dev/stdout) is written to as it is;
    so is a file that is a mount of its own, as containers have them: it cannot be replaced.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    data = (text.rstrip("\n") + "\n").encode("utf-8", errors="backslashreplace")
    with _naming(path, "written"):
        if _is_no_file(path):
            Path(path).write_bytes(data)
            return
        target = Path(os.path.realpath(path))
        with _beside(target, data, 0o666) as spare:
            if target.exists():
                spare.chmod(stat.S_IMODE(target.stat().st_mode))
            try:
                spare.replace(target)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                target.write_bytes(data)


def write_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Replace the file at `path` in one step; when this returns, file and name are on the disk.

    Raises:
        TPCheckError: the file cannot be written; names the path, and leaves nothing there.
    """
    target = Path(path)
    with _naming(path, "written"):
        with _beside(target, data, 0o644) as spare:
            spare.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_private_text(text: str, path: str | os.PathLike[str]) -> None:
    """Replace the file at `path` as `write_text` does; nobody but its owner can ever open it.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    data = text.encode("utf-8", errors="backslashreplace")
    with _naming(path, "written"):
        target = Path(os.path.realpath(path))
        with _beside(target, data, 0o600) as spare:
            spare.replace(target)


def create_file(data: bytes, path: str | os.PathLike[str], *, mode: int = 0o644) -> None:
    """Write a file that is not there yet, whole or not at all, with this mode from the start.

    Raises:
        TPCheckError: something is there already, or the file cannot be written; names the path.
    """
    with _naming(path, "written"), _beside(Path(path), data, mode) as spare:
        try:
            os.link(spare, path)  # unlike a rename, this never takes the place of another file
        except FileExistsError as error:
            raise TPCheckError(f"{path}: is there already and is not overwritten") from error


def read_bounded(path: str | os.PathLike[str], most_bytes: int, *, private: bool = False) -> bytes:
    """Return the content of a regular file that nobody vouches for. Neither hangs nor fills memory.

    Args:
        path: of the file; links are followed.
        most_bytes: a larger file is refused.
        private: refuse one that others than its owner may read or write.

    Raises:
        TPCheckError: it cannot be read, is no regular file or is too large; names the path.
    """
    with _naming(path, "read"), open(os.fspath(path), "rb", opener=_not_waiting) as file:
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise TPCheckError(f"{path}: is no regular file, but should be one")
        if private and stat.S_IMODE(mode) & 0o077:
            raise TPCheckError(
                f"{path}: has mode {stat.S_IMODE(mode):04o}, so that others can use it, but"
                f" should have 0600: chmod 600 {shlex.quote(os.fspath(path))}"
            )
        return _content(file, most_bytes, path)


def assert_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `write_text` would raise after the run. Leaves nothing behind.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    with _naming(path, "written"):
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_no_file(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        with _beside(target, b"", 0o666):
            pass


def is_file(path: str | os.PathLike[str]) -> bool:
    """Say whether a regular file is there; a name that no file can have, too long, says no."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in a file, as strict as the standard.

    Raises:
        TPCheckError: the file cannot be read or is not JSON; names the path.
    """
    return json_of(_read(path, MAX_JSON_BYTES), path)


def json_of(data: bytes, path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in the bytes of a file, as `read_json` does.

    Raises:
        TPCheckError: they are not JSON; names the path.
    """
    try:
        return parse_json(data)
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"{path}: is not JSON: {error}") from error


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the tables of a TOML file, as strict as the standard.

    Raises:
        TPCheckError: the file cannot be read, is not TOML in UTF-8, is larger than MAX_TOML_BYTES,
            or holds a whole number beyond 64 bits, which TOML leaves to each reader; names the
            path.
    """
    data = _read(path, MAX_TOML_BYTES)
    try:
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.count(b".") > _MAX_DOTS:
                raise ValueError(f"line {number} has more than {_MAX_DOTS} dots")
        value = tomllib.loads(data.decode("utf-8"))
        require_shallow(value)
        _require_64_bits(value)
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"{path}: is not TOML: {error}") from error
    return value


def _require_64_bits(value: Any) -> None:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number is beyond 64 bits")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _require_64_bits(inner)


@contextmanager
def _naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn what the system says against a file into a TPCheckError that names the path."""
    try:
        yield
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be {what}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte in the path
        raise TPCheckError(f"{os.fspath(path)!r:.80}: cannot be {what}: {error}") from error


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes would hold us


def _read(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Return the content of a file, or of a pipe that the user named."""
    with _naming(path, "read"), open(os.fspath(path), "rb") as file:
        return _content(file, most_bytes, path)


def _content(file: BinaryIO, most_bytes: int, path: str | os.PathLike[str]) -> bytes:
    """Read at most so many bytes, in pieces: Python takes the memory of what it is asked for."""
    pieces, left = [], most_bytes + 1
    while left and (piece := file.read(min(left, 1 << 20))):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise TPCheckError(f"{path}: is larger than {most_bytes} bytes")
    return b"".join(pieces)


@contextmanager
def _beside(target: Path, data: bytes, mode: int) -> Iterator[Path]:
    """Yield a file that holds the data and is on the disk; gone afterwards, unless it was moved.

    It lies beside the target, because a file can be replaced in one step only on its own file
    system.
    """
    spare = target.with_name(f".{target.name[:80]}.{uuid4().hex}.tmp")
    try:
        descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        yield spare
    finally:
        spare.unlink(missing_ok=True)


def _is_no_file(path: str | os.PathLike[str]) -> bool:
    # asked of the path as given: /dev/stdout of a pipe resolves to a name that does not exist
    return os.path.exists(path) and not os.path.isfile(path)
