"""TPGroup over torch.distributed: Gloo or NCCL carry the collectives, in the default group.

Requirement: a subject gets the collectives that would be deployed, as functions of tensors that
leave their input alone. The job's ranks are the default process group exactly, because many
libraries read `torch.distributed.get_world_size()`.

[CUDA Synchronisation] On CUDA a collective returns before it is done. Each is waited for here, so
that a hang shows in the collective that hangs and not in whatever reads the result first; ranks
that share a GPU also finish their own kernels before they enter one, which keeps a spinning
collective from starving them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from tpcheck.errors import BackendError
from tpcheck.groups.base import RecordedGroup, Recorder
from tpcheck.groups.flight import FlightSlot
from tpcheck.groups.weights import WeightSource, WeightStore

_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# The names of torch >= 2.13, which deprecates the old ones.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class DistributedGroup(RecordedGroup):
    """This rank's TPGroup over the default process group."""

    def __init__(self, world: DistributedWorld, **shared: Any) -> None:
        super().__init__(rank=world.rank, size=world.size, device=world.device, **shared)
        self._world = world

    @property
    def process_group(self) -> Any:
        self.lent = True
        return dist.group.WORLD

    @property
    def mesh(self) -> Any:
        self.lent = True
        return self._world.mesh()

    def _all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        self._refuse_float8("all_reduce", x)
        y = _copy(x)
        native = op in _REDUCTIONS or (self._on_nccl and y.is_floating_point())
        self._enter()
        dist.all_reduce(y, _REDUCTIONS.get(op, dist.ReduceOp.AVG if native else dist.ReduceOp.SUM))
        self._leave()
        if native:
            return y
        # What both backends do for the types they have no AVG for: sum, then divide once.
        if y.is_floating_point() or y.is_complex():
            return y.div_(self.size)
        return y.div_(self.size, rounding_mode="trunc")

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        if x.numel():
            self._enter()
            _all_gather_single(self._raw(gathered).view(-1), self._raw(_copy(x)).view(-1))
            self._leave()
        return torch.cat(gathered.unbind(0), dim)

    def _reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._refuse_float8("reduce_scatter", x)
        if not x.numel():
            return _copy(x.narrow(dim, 0, x.shape[dim] // self.size))
        pieces = torch.stack(x.detach().chunk(self.size, dim))
        mine = torch.empty(pieces.shape[1:], dtype=x.dtype, device=x.device)
        self._enter()
        _reduce_scatter_single(mine.view(-1), pieces.view(-1))
        self._leave()
        return mine

    def _all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        if not x.numel():
            piece = x.narrow(split_dim, 0, x.shape[split_dim] // self.size)
            return torch.cat([piece] * self.size, concat_dim)
        outgoing = torch.stack(self._raw(_copy(x)).chunk(self.size, split_dim))
        incoming = torch.empty_like(outgoing)
        self._enter()
        dist.all_to_all_single(incoming, outgoing)
        self._leave()
        return torch.cat(incoming.view(x.dtype).unbind(0), concat_dim)

    def _broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        y = _copy(x)
        if x.numel():
            self._enter()
            dist.broadcast(self._raw(y), src=src)
            self._leave()
        return y

    def _barrier(self) -> None:
        self._enter()
        dist.barrier()
        self._leave()

    @property
    def _on_nccl(self) -> bool:
        return self._world.backend.startswith("nccl")

    def _raw(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view that the backend can move: Gloo knows no float8, but any byte."""
        return x if self._on_nccl or not _is_float8(x) else x.view(torch.uint8)

    def _refuse_float8(self, op: str, x: torch.Tensor) -> None:
        if _is_float8(x) and not self._on_nccl:
            raise BackendError(
                f"{op}: dtype={x.dtype}, but Gloo adds no float8; cast before the call,"
                " or use --backend nccl"
            )

    def _enter(self) -> None:
        if self._world.backend == "nccl-loopback":
            torch.cuda.synchronize(self.device)

    def _leave(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclasses.dataclass(slots=True)
class DistributedWorld:
    """What a job function sees: this rank of the default process group. Implements World."""

    rank: int
    size: int
    backend: str
    device: torch.device
    store: WeightStore
    slot: FlightSlot
    _mesh: Any = None

    def group(
        self, *, seed: int, dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> DistributedGroup:
        self.slot.new_group()
        weights = WeightSource(seed=seed, dtype=dtype, weight_dtype=weight_dtype, store=self.store)
        recorder = Recorder(self.slot.enter, self.slot.exit)
        return DistributedGroup(
            self, dtype=dtype, weight_dtype=weight_dtype, weights=weights, recorder=recorder
        )

    def mesh(self) -> Any:
        """Return the DeviceMesh "tp" over all ranks, made once per world."""
        if self._mesh is None:
            from torch.distributed.device_mesh import init_device_mesh

            self._mesh = init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("tp",))
        return self._mesh


def _copy(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy outside autograd, which collectives do not take part in."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _is_float8(x: torch.Tensor) -> bool:
    return x.is_floating_point() and x.element_size() == 1
