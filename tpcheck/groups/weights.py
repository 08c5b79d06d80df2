"""Logical weights: generated once per case, shared by every rank, owned by whoever asks.

Requirement: `tp.weight(name, ...)` has the same values on every rank, degree and process, so it is
a function of (case seed, name); making it once and handing out copy-on-write views keeps ranks from
drawing the same normals eight times. In one process that is torch's lazy clone; across
processes a private (copy-on-write) file mapping.

[Weight Values] float32 standard normals from a generator seeded by BLAKE2b(seed, name), times std,
rounded to `weight_dtype` (what a checkpoint would store), then cast to the compute dtype. The
float64 oracle therefore sees exactly the weights the deployed run sees.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from tpcheck.errors import SubjectError

DEFAULT_STD_1D = 0.5
"""Biases and norm weights are never near zero: a zero bias hides a bias added on every rank."""


_clone: Callable[[torch.Tensor], torch.Tensor] = getattr(
    torch.Tensor, "_lazy_clone", torch.Tensor.clone
)
"""Copy on write, where torch has it."""


_SMALL_BYTES, _NEAR_BYTES = 1 << 20, 16 << 20
"""What a rank of the pool keeps of its own: tensors up to the one, together up to the other."""


class WeightStore(Protocol):
    """Where made tensors are kept. `get` returns a tensor that the caller may write to.

    A key is anything hashable whose repr is the same in every process.
    """

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor: ...


class MemoryStore:
    """Share within one process; keeps at most `max_bytes`, dropping the oldest first."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._tensors: dict[Hashable, torch.Tensor] = {}
        self._bytes = 0
        self._max_bytes = max_bytes

    def find(self, key: Hashable) -> torch.Tensor | None:
        """Return what `get` would, if it is kept."""
        tensor = self._tensors.get(key)
        return None if tensor is None else _clone(tensor)

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        tensor = self._tensors.get(key)
        if tensor is None:
            tensor = make()
            self._tensors[key] = tensor
            self._bytes += tensor.nbytes
            while self._bytes > self._max_bytes and len(self._tensors) > 1:
                oldest = next(iter(self._tensors))
                self._bytes -= self._tensors.pop(oldest).nbytes
        return _clone(tensor)


class FileStore:
    """Share between the ranks of one pool through files in `directory` (in /dev/shm when it can).

    The first rank to want a tensor makes it under a file lock, which the kernel releases if that
    rank dies; the others map it. When the disk is full a rank keeps a private copy instead. Small
    ones it keeps anyway: to map a file takes longer than to compute with what is in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._headers: dict[Hashable, tuple[str, torch.dtype, tuple[int, ...]]] = {}
        self._near = MemoryStore(_NEAR_BYTES)

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        near = self._near.find(key)
        if near is not None:
            return near
        try:
            header = self._headers.get(key)
            if header is None or not os.path.exists(header[0]):
                header = self._headers[key] = self._shared(key, make)
            tensor = self._map(*header)
        except OSError:
            return make()
        return tensor if tensor.nbytes > _SMALL_BYTES else self._near.get(key, tensor.clone)

    def _shared(
        self, key: Hashable, make: Callable[[], torch.Tensor]
    ) -> tuple[str, torch.dtype, tuple[int, ...]]:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        meta = self.directory / f"{digest}.meta"
        if not meta.exists():
            with open(self.directory / f"{digest}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not meta.exists():
                    self._write(digest, make())
        dtype_name, *dims = meta.read_text().split()
        data = str(self.directory / f"{digest}.data")
        return data, getattr(torch, dtype_name), tuple(map(int, dims))

    def trim(self, max_bytes: int) -> None:
        """Delete the oldest tensors until `max_bytes` are left. For the parent, between jobs."""
        files = sorted(self.directory.glob("*.data"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= max_bytes:
                return
            total -= path.stat().st_size
            for suffix in (".meta", ".data", ".lock"):
                path.with_suffix(suffix).unlink(missing_ok=True)

    def _write(self, digest: str, tensor: torch.Tensor) -> None:
        data, meta = self.directory / f"{digest}.data", self.directory / f"{digest}.meta"
        data.write_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        draft = meta.with_suffix(f".{os.getpid()}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        draft.write_text(" ".join([dtype, *map(str, tensor.shape)]))
        draft.replace(meta)

    @staticmethod
    def _map(data: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.from_file(data, shared=False, size=count, dtype=dtype).view(shape)


NamedLoader = tuple[str, Callable[[], torch.Tensor]]
"""An HF name and how to get its full tensor, rounded and cast like any other weight."""


class WeightSource:
    """One rank's weights for one build: `weight` and the raw material of `named_weights`."""

    def __init__(
        self,
        *,
        seed: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        store: WeightStore,
    ) -> None:
        self.seed = seed
        self.dtype = dtype
        self.weight_dtype = weight_dtype
        self._store = store
        self._asked: dict[str, tuple[object, ...]] = {}
        self._loaders: tuple[NamedLoader, ...] | None = None
        self.on_yield: Callable[[str, torch.Tensor], None] | None = None
        self.perturb: Callable[[str, torch.Tensor], torch.Tensor] | None = None

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        std: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        shape = self._checked_shape(name, shape)
        if dtype is not None and not dtype.is_floating_point:
            raise SubjectError(f"weight {name!r}: dtype={dtype}, but should be a floating dtype")
        if std is not None and not (math.isfinite(std) and std > 0):
            raise SubjectError(f"weight {name!r}: std={std}, but should be a positive number")
        asked = (shape, std, dtype)
        if self._asked.setdefault(name, asked) != asked:
            first = self._asked[name]
            raise SubjectError(
                f"weight {name!r}: asked with shape, std, dtype = {_describe(asked)},"
                f" but was asked before with {_describe(first)}; give each tensor its own name"
            )
        target = dtype or self.dtype
        # Not its text: each rank asks for each weight, and text takes longer than the look-up.
        key = (self.seed, name, shape, std, self.weight_dtype, target)
        tensor = self._store.get(key, partial(self._make, name, shape, std, target))
        return tensor if self.perturb is None else self.perturb(name, tensor)

    def offer(self, loaders: Iterable[NamedLoader]) -> None:
        """Set what `named_weights()` yields: a checkpoint's tensors, or generated ones."""
        self._loaders = tuple(loaders)

    @property
    def offered(self) -> tuple[str, ...]:
        """The names that `named` yields."""
        return tuple(name for name, _ in self._loaders or ())

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self._loaders is None:
            raise SubjectError(
                "named_weights(): the subject declares no weights;"
                " pass weights= to @tpcheck.subject (a safetensors directory or a dict of shapes)"
            )
        for name, load in self._loaders:
            tensor = load()
            if self.perturb is not None:
                tensor = self.perturb(name, tensor)
            if self.on_yield is not None:
                self.on_yield(name, tensor)
            yield name, tensor

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Round a checkpoint's floating tensor to `weight_dtype` and cast it to `dtype`."""
        if not tensor.dtype.is_floating_point:
            return tensor
        return tensor.to(self.weight_dtype).to(self.dtype)

    def _make(
        self, name: str, shape: tuple[int, ...], std: float | None, dtype: torch.dtype
    ) -> torch.Tensor:
        generator = keyed_generator(f"{self.seed}\0{name}")
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        values.mul_(_default_std(shape) if std is None else std)
        return values.to(self.weight_dtype).to(dtype)

    def _checked_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
            shape = tuple(shape[0])
        for size in shape:
            if not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise SubjectError(
                    f"weight {name!r}: shape={shape}, but should be whole sizes >= 0"
                )
        return shape


def keyed_generator(key: str) -> torch.Generator:
    """Return a generator seeded by BLAKE2b of `key`: the same on every rank and in every process.

    The scripts of `tpcheck.repro` stand alone and so say it again.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _default_std(shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return DEFAULT_STD_1D
    return 1.0 / math.sqrt(max(1, shape[-1]))


def _describe(asked: tuple[object, ...]) -> str:
    shape, std, dtype = asked
    return f"{list(shape)}, {std}, {dtype}"  # type: ignore[call-overload]
