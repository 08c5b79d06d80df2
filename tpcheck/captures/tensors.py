"""One recorded tensor, read in pieces.

Requirement: a capture may hold tensors larger than memory, on a disk that fails, in files that are
still being written. So elements are read by position into memory of their own (a mapping of a file
that shrinks kills the process), and a file that ends too early is an error that names it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from tpcheck.errors import TPCheckError
from tpcheck.header_check.headers import Header

_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
}
_INTEGERS = {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)}
_PACKED = {"F4": (4, "float4_e2m1"), "F6_E2M3": (6, "float6_e2m3"), "F6_E3M2": (6, "float6_e3m2")}
"""Elements of less than a byte: torch has no numbers of them, so their bytes are compared."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tensor(Protocol):
    """A tensor of a capture; `read` returns elements by their flat position."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def where(self) -> str: ...
    def read(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file. Only its header has been read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def where(self) -> str:
        """The file that holds it."""
        return str(self.path)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements start to stop, flat, in memory of their own.

        Raises:
            TPCheckError: the file cannot be read, or is shorter than its header said.
        """
        held = _held_dtype(self.dtype)
        width = held.itemsize
        if stop <= start:
            return torch.empty(0, dtype=held)
        data = bytearray((stop - start) * width)
        view, got = memoryview(data), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.begin + start * width)
                while got < len(data):
                    count = file.readinto(view[got:])
                    if not count:
                        raise TPCheckError(f"{self.path}: became shorter while it was read")
                    got += count
        except OSError as error:
            raise TPCheckError(f"{self.path}: cannot be read: {error.strerror}") from error
        return torch.frombuffer(data, dtype=torch.uint8).view(held)


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor that the caller holds in memory."""

    tensor: torch.Tensor
    where: str = "memory"

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return elements start to stop, flat, on the CPU."""
        part = self.tensor.detach().reshape(-1)[start:stop].cpu()
        return part.view(torch.uint8) if part.dtype == torch.bool else part


def stored(path: Path, header: Header) -> StoredTensor:
    """Return the tensor that a file's header describes."""
    if header.dtype in _PACKED:
        dtype = _PACKED[header.dtype][1]
    elif header.dtype in _INTEGERS:
        dtype = f"{'int' if header.dtype[0] == 'I' else 'uint'}{header.dtype[1:]}"
    else:
        dtype = _FLOATS.get(header.dtype, header.dtype.lower())  # BOOL
    return StoredTensor(path, dtype, header.shape, header.begin)


def numel(tensor: Tensor) -> int:
    """Return the number of logical elements."""
    return math.prod(tensor.shape)


def is_packed(tensor: Tensor) -> bool:
    """Say whether elements are narrower than a byte."""
    return tensor.dtype in {name for _, name in _PACKED.values()}


def byte_count(tensor: Tensor) -> int:
    """Return how many bytes hold the elements."""
    widths = {name: bits for bits, name in _PACKED.values()}
    bits = widths.get(tensor.dtype) or _held_dtype(tensor.dtype).itemsize * 8
    return -(-numel(tensor) * bits // 8)


def has_rounding(dtype: str) -> bool:
    """Say whether a dtype holds rounded numbers: only then does a tolerance make sense."""
    return dtype in _FLOATS.values() or dtype.startswith("complex")


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """Return the elements as whole numbers of the same bits; complex ones are two each."""
    plain = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    return plain.contiguous().view(_BITS[plain.element_size()])


def _held_dtype(dtype: str) -> torch.dtype:
    """Return what elements are read as; bytes that are no bool would make a bool of two truths."""
    if dtype == "bool" or dtype in {name for _, name in _PACKED.values()}:
        return torch.uint8
    held: torch.dtype = getattr(torch, dtype)
    return held
