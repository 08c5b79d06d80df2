"""Tensors of one safetensors file by plain reads, at the places that its header says.

Requirement: what is read is in memory once, in the tensor itself. Pages of a mapped file count as
this process's memory too, and a file that is cut short under a mapping kills the process by SIGBUS
where a plain read ends early, which is an error that names the tensor.
"""

from __future__ import annotations

import math
import os
import stat
import weakref
from pathlib import Path

import torch

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.header_check.headers import Header, read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Those that a reference decoder reads; of others `slice` returns None."""


class PlainFile:
    """An open safetensors file.

    Raises:
        SubjectError: it cannot be read, is cut short or contradicts itself; names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # a pipe of that name must not hang us
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SubjectError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:  # a zero byte in the path
            raise SubjectError(f"{str(path)!r}: cannot be read: {error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise SubjectError(f"{path}: is no regular file, but should be one")
        try:
            self._headers = read_header(path)
        except TPCheckError as error:
            raise SubjectError(str(error)) from error

    @property
    def headers(self) -> dict[str, Header]:
        """What the file says of each tensor, by name."""
        return dict(self._headers)

    def slice(
        self, name: str, dim: int, start: int, stop: int, index: int | None = None
    ) -> torch.Tensor | None:
        """Return indices start to stop of `dim`, in the dtype stored; None if not in one piece.

        Args:
            index: within one tensor of a stack, where dims are counted in that one.

        Raises:
            SubjectError: the file ends before the slice does; names the file and the tensor.
        """
        if name not in self._headers:
            raise SubjectError(f"{self._path}: {name}: is not there any more: file was replaced")
        header = self._headers[name]
        dtype = _DTYPES.get(header.dtype)
        shape = header.shape if index is None else header.shape[1:]
        if dtype is None or not 0 <= start <= stop <= shape[dim]:
            return None
        if math.prod(shape[:dim]) != 1 and (start, stop) != (0, shape[dim]):
            return None
        row = math.prod(shape[dim + 1 :])
        first = (index or 0) * math.prod(shape) + start * row
        piece = (*shape[:dim], stop - start, *shape[dim + 1 :])
        raw = torch.empty(math.prod(piece) * dtype.itemsize, dtype=torch.uint8)
        self._fill(raw, name, header.begin + first * dtype.itemsize)
        return raw.view(dtype).view(piece)

    def _fill(self, raw: torch.Tensor, name: str, at: int) -> None:
        left = raw.numpy().data
        while left:
            try:
                count = os.preadv(self._descriptor, [left], at)
            except OSError as error:
                raise SubjectError(
                    f"{self._path}: {name}: cannot be read: {error.strerror}"
                ) from error
            if count == 0:
                raise SubjectError(
                    f"{self._path}: {name}: the file ends at byte {at}, but should hold"
                    f" {len(left)} more of this tensor: it was cut short after it was opened"
                )
            left, at = left[count:], at + count
