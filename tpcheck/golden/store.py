"""The folder that golden records lie in: two files a record, written so that no kill can hurt it.

Requirement: whatever ends the writer (kill -9, a full disk, power), the folder holds the records it
held before, whole, and perhaps the new one, whole. The data goes first, under a name that carries
its own digest, and is on the disk before the manifest takes its place in one step: a manifest never
names what is not there, and an update never touches what the old manifest names. Readers trust
nothing: what is cut off, edited, renamed or swapped is refused by name. Loads no torch.

[Leftovers] Whoever holds the lock is the only writer, so a temporary file or data that no manifest
names was left by a killed one: the next writer removes it, readers pass over it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpcheck.errors import TPCheckError
from tpcheck.files import assert_writable, read_bounded, write_bytes
from tpcheck.golden.records import SCHEMA, Golden, data_file, from_json, to_json
from tpcheck.json_reader import parse_json

LOCK_S = 30.0
"""How long a recorder waits for another one, which holds the folder for one record at a time."""

MAX_MANIFEST_BYTES = 64 * 2**20

_OURS = r"[A-Za-z0-9_-]+\.s\d+-b\d+-t\d+(-[0-9a-f]{8})?\.(bfloat16|float16|float32)\.[0-9a-f]{12}"
_MANIFEST = re.compile(_OURS + r"\.json")
_DATA = re.compile(_OURS + r"\.[0-9a-f]{12}\.safetensors")
_TEMPORARY = re.compile(r"\." + _OURS + r".*\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a folder. `golden` is None where nothing can be said of it but the problem.

    state: ok, corrupt, unknown schema, missing data, leftover (data that no manifest names) or
    temporary.
    """

    file: str
    state: str
    golden: Golden | None = None
    problem: str = ""


def scan(folder: Path) -> tuple[Entry, ...]:
    """Return every record of a folder, and what else in it was written by us, sorted by name.

    Data is read whole and held against its digest. A folder that is not there holds nothing.

    Raises:
        TPCheckError: the folder cannot be listed; names it.
    """
    names = _names(folder)
    entries = [_entry(folder, name) for name in names if name.endswith(".json")]
    left = _unnamed(names, {entry.file: entry.golden for entry in entries})
    entries += [Entry(name, "leftover", None, "no record names it") for name in left]
    entries += [Entry(name, "temporary") for name in names if _TEMPORARY.fullmatch(name)]
    return tuple(sorted(entries, key=lambda entry: entry.file))


def read_manifest(path: Path) -> Golden:
    """Return the record whose manifest this is; its data is not read.

    Raises:
        TPCheckError: it cannot be read, is no manifest, was edited or renamed; names the file.
    """
    data = read_bounded(path, MAX_MANIFEST_BYTES)
    try:
        golden = from_json(parse_json(data))
        if path.name != golden.file:
            raise TPCheckError(f"the file should be called {golden.file}: it was renamed")
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"{path}: is not JSON, so it was cut off or edited: {error}") from error
    except TPCheckError as error:
        raise TPCheckError(f"{path}: {error}") from error
    if golden.data.file != data_file(golden.stem, golden.data.sha256):
        raise TPCheckError(f"{path}: golden.data.file={golden.data.file!r} is not its own data")
    return golden


def read_data(folder: Path, golden: Golden) -> bytes:
    """Return a record's safetensors file as it was written.

    Raises:
        TPCheckError: it is missing, cut off or not the bytes that were written; names the file.
    """
    path = folder / golden.data.file
    if not path.exists():
        raise TPCheckError(f"{path}: is missing, but {golden.file} names it")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be read: {error.strerror}") from error
    if size != golden.data.bytes:
        what = "cut off" if size < golden.data.bytes else "added to"
        raise TPCheckError(
            f"{path}: has {size} bytes, but should have {golden.data.bytes}: it was {what}"
        )
    data = read_bounded(path, golden.data.bytes)
    found = hashlib.sha256(data).hexdigest()
    if found != golden.data.sha256:
        raise TPCheckError(
            f"{path}: SHA-256 is {found[:12]}..., but should be {golden.data.sha256[:12]}...:"
            " it was edited or swapped"
        )
    return data


def prepare(folder: Path) -> None:
    """Make the folder and know that a record can be written, before anything is run.

    Raises:
        TPCheckError: it cannot be made or written to; names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TPCheckError(f"{folder}: cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TPCheckError(f"{folder}: cannot be written to, so no record can be kept there")
    with locked(folder):
        _clean(folder)
        assert_writable(folder / "record.json")


def write(folder: Path, golden: Golden, data: bytes, *, instead_of: Sequence[Entry] = ()) -> None:
    """Write a record, then remove those it takes the place of. Call it within `locked`.

    Raises:
        TPCheckError: the disk is full, the folder cannot be written to; nothing of it is left.
    """
    path = folder / golden.data.file
    held = _names(folder)
    try:
        write_bytes(data, path)
        manifest = json.dumps(to_json(golden), indent=1, ensure_ascii=False, allow_nan=False)
        write_bytes(manifest.encode() + b"\n", folder / golden.file)
    except TPCheckError:
        if golden.data.file not in held:
            with contextlib.suppress(OSError):  # the next writer removes it
                path.unlink(missing_ok=True)
        raise
    for old in instead_of:
        if old.file != golden.file:
            _remove(folder / old.file)
    _clean(folder)  # and with it the data that only those named


@contextlib.contextmanager
def locked(folder: Path, wait_s: float = LOCK_S) -> Iterator[None]:
    """Be the folder's only writer. The kernel lets go of the lock when this process dies.

    Raises:
        TPCheckError: another recorder holds it for longer than `wait_s`; names the folder.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TPCheckError(f"{folder}: cannot be opened: {error.strerror}") from error
    try:
        deadline = time.monotonic() + wait_s
        while not _locks(descriptor, folder):
            if time.monotonic() > deadline:
                raise TPCheckError(
                    f"{folder}: another recorder has been writing to it for {wait_s:g} s;"
                    " wait for it to end, or record into a folder of its own"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def missing(entries: Sequence[Entry], subject: str) -> tuple[tuple[str, str], ...]:
    """Return the (case, dtype) that a subject's records name as made with them and are not there.

    A recorder that was killed leaves records that name those it did not come to; so does whoever
    deletes one.
    """
    ours = [e.golden for e in entries if e.golden is not None and e.golden.subject == subject]
    there = {golden.named for golden in ours}
    named = dict.fromkeys(one for golden in ours for one in golden.together)
    return tuple(one for one in named if one not in there)


def _locks(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise TPCheckError(f"{folder}: cannot be locked: {error.strerror}") from error
    return True


def _entry(folder: Path, name: str) -> Entry:
    path = folder / name
    try:
        golden = read_manifest(path)
    except TPCheckError as error:
        problem = str(error).removeprefix(f"{path}: ")
        other = "golden.schema=" in problem and SCHEMA in problem
        return Entry(name, "unknown schema" if other else "corrupt", None, problem)
    try:
        read_data(folder, golden)
    except TPCheckError as error:
        there = (folder / golden.data.file).exists()
        problem = str(error).removeprefix(f"{folder}{os.sep}")
        return Entry(name, "corrupt" if there else "missing data", golden, problem)
    return Entry(name, "ok", golden)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TPCheckError(f"{folder}: cannot be listed: {error.strerror}") from error


def _clean(folder: Path) -> None:
    """Remove [Leftovers]."""
    names = _names(folder)
    goldens: dict[str, Golden | None] = {}
    for name in names:
        if _MANIFEST.fullmatch(name):
            try:
                goldens[name] = read_manifest(folder / name)
            except TPCheckError:
                goldens[name] = None
    for name in (*_unnamed(names, goldens), *filter(_TEMPORARY.fullmatch, names)):
        _remove(folder / name)


def _unnamed(names: Sequence[str], goldens: Mapping[str, Golden | None]) -> list[str]:
    """Return the data that no manifest names; one of its stem that cannot be read may well do."""
    named = {golden.data.file for golden in goldens.values() if golden is not None}
    broken = {name.removesuffix(".json") for name, golden in goldens.items() if golden is None}
    return [
        name
        for name in names
        if _DATA.fullmatch(name)
        and name not in named
        and name.removesuffix(".safetensors").rpartition(".")[0] not in broken
    ]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise TPCheckError(f"{path}: cannot be removed: {error.strerror}") from error
