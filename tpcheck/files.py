"""Write files in one step, and read JSON that nobody vouches for. Torch-free.

Requirement: a reader never sees half a file, whatever kills the writer, and a JSON file means the
same to every reader: no NaN or Infinity, no key that stands twice.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any
from uuid import uuid4

from tpcheck.errors import TPCheckError
from tpcheck.json_reader import parse_json


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Replace the file at `path` by `text` and a newline in one step.

    Links are followed. What is there and not a file (a pipe, /dev/stdout) is written to as it is.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    target = Path(os.path.realpath(path))
    data = (text.rstrip("\n") + "\n").encode("utf-8", errors="backslashreplace")
    try:
        if _is_no_file(path):
            Path(path).write_bytes(data)
            return
        spare = _spare_name(target)
        try:
            with spare.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                spare.chmod(stat.S_IMODE(target.stat().st_mode))
            spare.replace(target)
        finally:
            spare.unlink(missing_ok=True)
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be written: {error.strerror}") from error


def assert_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `write_text` would raise after the run. Leaves nothing behind.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_no_file(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        spare = _spare_name(target)
        spare.open("xb").close()
        spare.unlink()
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be written: {error.strerror}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the JSON value in a file, as strict as the standard.

    Raises:
        TPCheckError: the file cannot be read or is not JSON; names the path.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"{path}: is not JSON: {error}") from error


def _is_no_file(path: str | os.PathLike[str]) -> bool:
    # asked of the path as given: /dev/stdout of a pipe resolves to a name that does not exist
    return os.path.exists(path) and not os.path.isfile(path)


def _spare_name(target: Path) -> Path:
    # beside the target, because a file can be replaced in one step only on its own file system
    return target.with_name(f".{target.name[:80]}.{uuid4().hex}.tmp")
