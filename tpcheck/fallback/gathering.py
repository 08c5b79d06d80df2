"""Whole weights from the ranks' pieces, one part of the model at a time, and what that costs.

Requirement: a server's memory was sized for 1/N of the weights, so nothing here holds more of them
at once than it was told to. What a remedy moved, how much of it lay in memory together and how long
it took is counted while it runs, not assumed.

[Bytes Gathered] What this rank received: whole tensors less its own part of them; of an all-reduce
what a ring brings it, 2 (t - 1) / t of the tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.placement import Placement, Replicate
from tpcheck.sharding import unshard


class Collectives(Protocol):
    """What a remedy needs of the ranks: a TPGroup has it, and so has `MeshGroup`."""

    rank: int
    size: int

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor: ...

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor: ...

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor: ...


class MeshGroup:
    """The collectives of a DTensor model's own mesh; they leave their input alone."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        self.rank, self.size = self.group.rank(), self.group.size()

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's `x`, of one shape, along `dim`, in rank order."""
        mine = x.detach().contiguous()
        pieces = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(pieces, mine, group=self.group)
        return torch.cat(pieces, dim)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Sum `x` over ranks."""
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=self.group)
        return y

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Return rank `src`'s `x`."""
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(y, group_src=src, group=self.group)
        return y


@dataclass(frozen=True, slots=True)
class Cost:
    """What a remedy took on this rank: bytes received, most of them held at once, seconds."""

    bytes_gathered: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """Return the two one after the other."""
        return Cost(
            self.bytes_gathered + other.bytes_gathered,
            max(self.peak_bytes, other.peak_bytes),
            self.seconds + other.seconds,
        )


class Meter:
    """Counts what is gathered and held, and refuses to hold more whole weights than `max_bytes`.

    The buffer of a gather comes on top while it runs: one tensor, or two.

    Raises:
        TPCheckError: max_bytes is no positive whole number.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        whole = isinstance(max_bytes, int) and not isinstance(max_bytes, bool)
        if max_bytes is not None and not (whole and max_bytes > 0):
            raise TPCheckError(f"max_bytes={max_bytes!r}, but should be a whole number above 0")
        self.max_bytes = max_bytes
        self._gathered = self._held = self._peak = 0
        self._started = time.perf_counter()

    def received(self, whole_bytes: int, own_bytes: int) -> None:
        """Count a tensor that was put together from the ranks."""
        self._gathered += max(0, whole_bytes - own_bytes)

    @contextmanager
    def holding(self, what: str, size: int) -> Iterator[None]:
        """Hold `size` bytes of whole weights while open.

        Raises:
            SubjectError: that is more than `max_bytes`; names the part and what it needs.
        """
        self.hold(what, size)
        try:
            yield
        finally:
            self.release(size)

    def hold(self, what: str, size: int) -> None:
        """Begin to hold `size` bytes; see `holding`."""
        if self.max_bytes is not None and self._held + size > self.max_bytes:
            raise SubjectError(
                f"{what}: max_bytes={self.max_bytes}, but should be at least"
                f" {self._held + size}, its whole weights: nothing smaller can be streamed"
            )
        self._held += size
        self._peak = max(self._peak, self._held)

    def release(self, size: int) -> None:
        """Hold `size` bytes less."""
        self._held -= size

    def start(self) -> None:
        """Begin a measurement; what is held now stays held."""
        self._gathered, self._peak = 0, self._held
        self._started = time.perf_counter()

    def cost(self) -> Cost:
        """Return what was counted since `start`."""
        return Cost(self._gathered, self._peak, time.perf_counter() - self._started)


def gathered_weight(
    local: torch.Tensor,
    placements: Sequence[Placement],
    local_shapes: Sequence[tuple[int, ...]],
    shape: tuple[int, ...],
    tp: Collectives,
    meter: Meter,
) -> torch.Tensor:
    """Return the whole tensor that the ranks' pieces make up; all ranks call it together.

    Args:
        local: this rank's piece, pads included.
        placements: one per rank, as are local_shapes.
        shape: of the whole tensor.

    Raises:
        SubjectError: the pieces do not make up `shape`.
    """
    if tp.size == 1 and local.shape == torch.Size(shape):
        return local
    if all(isinstance(placement, Replicate) for placement in placements):
        return local
    every = gathered_pieces(local, local_shapes, tp)
    whole = unshard(every, placements, shape)
    meter.received(whole.nbytes, local.nbytes)
    return whole


def gathered_pieces(
    local: torch.Tensor, shapes: Sequence[tuple[int, ...]], tp: Collectives
) -> list[torch.Tensor]:
    """Return every rank's tensor where they differ in size: sent padded to the largest."""
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = local
    if list(local.shape) != largest:
        padded = local.new_zeros(largest)
        padded[tuple(slice(size) for size in local.shape)] = local
    every = tp.all_gather(padded.detach().unsqueeze(0).contiguous(), 0)
    return [
        piece[tuple(slice(size) for size in shape)]
        for piece, shape in zip(every, shapes, strict=True)
    ]


def joined_last(
    x: torch.Tensor, widths: Sequence[int], tp: Collectives, meter: Meter | None = None
) -> torch.Tensor:
    """Return the ranks' slices of a last dim, `widths` wide, side by side in rank order."""
    if tp.size == 1:
        return x
    shapes = [(*x.shape[:-1], width) for width in widths]
    whole = torch.cat(gathered_pieces(x, shapes, tp), -1)
    if meter is not None:
        meter.received(whole.nbytes, x.nbytes)
    return whole
