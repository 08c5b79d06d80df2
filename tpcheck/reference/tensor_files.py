"""The tensors of a model directory, read slice by slice.

Requirement: a rank reads the bytes that it holds, whatever their format; names, shapes and dtypes
come from the files' headers. What lies in one piece is read plainly (plain_file), so that it is in
memory once; a cut through every row is taken from the mapped file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.files import is_file, read_json
from tpcheck.hf.config import describe_directory
from tpcheck.json_reader import brief
from tpcheck.reference.plain_file import PlainFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a directory, in one safetensors file or several with an index."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._handles: dict[str, Any] = {}
        self._plain: dict[str, PlainFile] = {}
        self._files = self._map_names()

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, as stored."""
        return tuple(self._files)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files that hold them, sorted."""
        return tuple(sorted(set(self._files.values())))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Reads the file's header only."""
        with self._reading(name) as file:
            return tuple(self._open(file).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it: "F8_E4M3". Reads the header only."""
        with self._reading(name) as file:
            return str(self._open(file).get_slice(name).get_dtype())

    def whole(self, name: str) -> torch.Tensor:
        """Return all of a small tensor."""
        with self._reading(name) as file:
            tensor: torch.Tensor = self._open(file).get_tensor(name)
            return tensor.clone()

    def slice(
        self, name: str, dim: int, start: int, stop: int, index: int | None = None
    ) -> torch.Tensor:
        """Return indices start to stop of `dim`, in the dtype stored.

        With an `index` that is done within one tensor of a stack, and dims are counted in it.

        Reads those bytes only, as far as pages allow: a cut along dim 1 takes a few bytes of every
        row, so that the kernel may read most of that tensor. What stays in memory is the slice.
        """
        file = self._file(name)
        if file not in self._plain:
            self._plain[file] = PlainFile(self.directory / file)
        plain = self._plain[file].slice(name, dim, start, stop, index)
        if plain is not None:
            return plain
        with self._reading(name):
            return self._mapped(file, name, dim, start, stop, index)

    def _mapped(
        self, file: str, name: str, dim: int, start: int, stop: int, index: int | None
    ) -> torch.Tensor:
        whole = self._open(file).get_slice(name)
        stack = () if index is None else (index,)
        if start == stop:  # safetensors refuses empty slices
            shape = list(whole.get_shape())[len(stack) :]
            shape[dim] = 0
            some = whole[(*stack, *(slice(0, 1) for _ in shape))]
            return torch.empty(shape, dtype=some.dtype)
        # A view of the mapped file: copied, so that the weights outlive the file and its mapping.
        part: torch.Tensor = whole[(*stack, *[slice(None)] * dim, slice(start, stop))]
        return part.clone(memory_format=torch.contiguous_format)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[str]:
        """Yield a tensor's file; what the library says of a dtype it cannot hold names both."""
        file = self._file(name)
        try:
            yield file
        except SafetensorError as error:
            raise SubjectError(f"{self.directory / file}: {brief(name)}: {error!s:.300}") from error

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise SubjectError(f"{self.directory}: tensor {name!r} is missing")
        return self._files[name]

    def _map_names(self) -> dict[str, str]:
        """Return which file holds each tensor."""
        if (self.directory / INDEX).is_file():
            return self._read_index()
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise SubjectError(
            f"{self.directory}: neither {SINGLE} nor {INDEX} is there;"
            f" {describe_directory(self.directory)}"
        )

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        try:
            index = read_json(path)
        except TPCheckError as error:
            raise SubjectError(f"{path}: {error}") from error
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise SubjectError(f"{path}: weight_map should say the file of each tensor")
        held: dict[str, set[str]] = {}
        for file in sorted(set(files.values())):
            if Path(file).name != file or not is_file(self.directory / file):
                raise SubjectError(
                    f"{path}: names {brief(file)}, which is not there;"
                    f" {describe_directory(self.directory)}"
                )
            held[file] = set(self._open(file).keys())
        for name, file in files.items():
            if name not in held[file]:
                raise SubjectError(f"{path}: says that {file} holds {brief(name)}, but it does not")
        return files

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                path = str(self.directory / file)
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise SubjectError(
                    f"{self.directory / file}: cannot be read: {error!s:.300}"
                ) from error
        return self._handles[file]
