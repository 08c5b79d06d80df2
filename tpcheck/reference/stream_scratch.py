"""What a streamed run keeps between layers, so that a killed one goes on where it was.

Requirement: never a wrong result. What is kept belongs to a key (inputs, config, dtypes, how the
weight files look, what computes) and is believed only where the key is the same to the last field
and the digest over key, layer and every byte is right; anything else is left aside, with the
reason. A manifest that is replaced in one step names the file with the activations, so that
a kill at any moment leaves the layer before or this one, never a mixture. One run at a time: the
folder is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tpcheck.errors import TPCheckError
from tpcheck.files import read_bounded, write_text
from tpcheck.json_reader import parse_json
from tpcheck.reference.plain_file import PlainFile

SCHEMA = "tpcheck.stream/1"
MANIFEST = "stream.json"
_PREFIX, _SUFFIX = "after-layer-", ".safetensors"
_STAGING = ".layer-being-written"
_MOST_BYTES = 16 * 2**20
"""Of a manifest: it lists the weight files."""

LOG = logging.getLogger("tpcheck.streaming")
"""Says on stderr, unless told otherwise, why a run starts over or is not kept."""


class Scratch:
    """A folder with the activations after the last whole layer; `opened` makes and locks it."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder, self._key = folder, dict(key)
        self._complained = False

    def load(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> tuple[int, list[torch.Tensor]]:
        """Return how many layers are done and the activations after them; (0, []) to start over.

        Args:
            shapes: of the activations, as the inputs make them.
            dtype: of the activations.
        """
        manifest = self._folder / MANIFEST
        if not manifest.exists():
            self._sweep(keep="")
            return 0, []
        try:
            done, file, xs = self._believed(manifest, shapes, dtype)
        except TPCheckError as error:
            LOG.warning("%s; starting over", error)
            self._clear()
            return 0, []
        self._sweep(keep=file)
        return done, xs

    def save(self, done: int, xs: Sequence[torch.Tensor]) -> None:
        """Keep the activations after `done` layers. Where that fails the run goes on without."""
        digest = _digest(self._key, done, xs)
        path = self._folder / f"{_PREFIX}{done:05}-{digest[:16]}{_SUFFIX}"
        try:
            self._save(done, xs, digest, path)
        except (OSError, SafetensorError, TPCheckError) as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            shutil.rmtree(self._folder / _STAGING, ignore_errors=True)
            if not self._complained:
                LOG.warning("%s: layer %s cannot be kept: %s", self._folder, done, error)
            self._complained = True

    def remove(self) -> None:
        """Remove what was kept, and the folder if nothing else is in it."""
        self._clear()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _save(self, done: int, xs: Sequence[torch.Tensor], digest: str, path: Path) -> None:
        staging = self._folder / _STAGING  # safetensors writes beside, under names of its own
        staging.mkdir(exist_ok=True)
        written = staging / path.name
        save_file({f"{number:05}": x.contiguous() for number, x in enumerate(xs)}, written)
        with written.open("rb") as file:
            os.fsync(file.fileno())
        written.replace(path)
        fields = {
            "schema": SCHEMA,
            "key": self._key,
            "done": done,
            "activations": path.name,
            "sha256": digest,
        }
        write_text(json.dumps(fields, indent=2, sort_keys=True), self._folder / MANIFEST)
        self._sweep(keep=path.name)

    def _believed(
        self, manifest: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> tuple[int, str, list[torch.Tensor]]:
        """Return what is kept, or raise with the reason why it is not this run's."""
        try:
            fields = parse_json(read_bounded(manifest, _MOST_BYTES))
        except (ValueError, RecursionError) as error:
            raise TPCheckError(f"{manifest}: is not JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise TPCheckError(f"{manifest}: is no {SCHEMA}")
        key, done = fields.get("key"), fields.get("done")
        file, sha256 = fields.get("activations"), fields.get("sha256")
        if not isinstance(key, dict) or not isinstance(file, str) or not isinstance(sha256, str):
            raise TPCheckError(f"{manifest}: lacks its key, its file or its digest")
        if not isinstance(done, int) or isinstance(done, bool):
            raise TPCheckError(f"{manifest}: done={done!r}, but should count layers")
        other = sorted(name for name in {*key, *self._key} if key.get(name) != self._key.get(name))
        if other:
            raise TPCheckError(f"{manifest}: was made with other {', '.join(other)}")
        if Path(file).name != file or not file.startswith(_PREFIX):
            raise TPCheckError(f"{manifest}: activations={file!r}, but should name a file beside")
        xs = _read(self._folder / file, shapes, dtype)
        if _digest(self._key, done, xs) != sha256:
            raise TPCheckError(f"{self._folder / file}: its bytes are not those of its digest")
        return done, file, xs

    def _clear(self) -> None:
        """Remove what was kept, whatever it is: a pipe would be written to, and hang."""
        with contextlib.suppress(OSError):
            (self._folder / MANIFEST).unlink(missing_ok=True)
            self._sweep(keep="")

    def _sweep(self, keep: str) -> None:
        """Remove other layers', and what a kill left of a file that was being written."""
        shutil.rmtree(self._folder / _STAGING, ignore_errors=True)
        for pattern in (f"{_PREFIX}*{_SUFFIX}", f".{MANIFEST}.*.tmp"):
            for path in self._folder.glob(pattern):
                if path.name != keep:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(folder: Path | None, key: Mapping[str, Any]) -> Iterator[Scratch | None]:
    """Make the folder where it is not there, lock it, and yield what keeps activations in it.

    Raises:
        TPCheckError: it cannot be made or written to, or another run has it; names it.
    """
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise TPCheckError(f"{folder}: cannot be used as scratch: {error.strerror}") from error
    try:
        _lock(descriptor, folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise TPCheckError(f"{folder}: cannot be used as scratch: it is not writable")
        yield Scratch(folder, key)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise TPCheckError(
                f"{folder}: another run keeps its layers there; give each its own scratch"
            ) from error
        # a file system that has no locks


def _read(path: Path, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the activations of a file that has these shapes and this dtype, and no others."""
    file = PlainFile(path)
    names = [f"{number:05}" for number in range(len(shapes))]
    if sorted(file.headers) != names:
        raise TPCheckError(f"{path}: holds {len(file.headers)} inputs, but should {len(names)}")
    xs = []
    for name, shape in zip(names, shapes, strict=True):
        actual = file.headers[name].shape
        x = file.slice(name, 0, 0, shape[0]) if actual == shape else None
        if x is None or x.dtype != dtype:
            raise TPCheckError(f"{path}: {name}: {list(actual)}, but should be {list(shape)}")
        xs.append(x)
    return xs


def _digest(key: Mapping[str, Any], done: int, xs: Sequence[torch.Tensor]) -> str:
    whole = hashlib.sha256(json.dumps([key, done, len(xs)], sort_keys=True).encode())
    for x in xs:
        whole.update(tensor_digest(x).encode())
    return whole.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
