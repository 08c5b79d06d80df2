"""TPGroup: the seam between a subject and the ranks it runs on.

Requirement: a subject written against TPGroup runs unchanged on simulated ranks, Gloo and NCCL.
Everything the two implementations share stands here once: argument checks, the log of collectives,
the identity at size 1, the weights, and the place where a check may watch or replace a collective
(`interceptor`). An implementation adds five primitives.

Shape rules: every rank passes equal shape and dtype; split dims divide by size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from tpcheck.errors import SubjectError
from tpcheck.outputs import digest
from tpcheck.trace import Collective

if TYPE_CHECKING:
    from tpcheck.groups.weights import WeightSource

REDUCE_OPS = ("sum", "max", "min", "avg")


@runtime_checkable
class TPGroup(Protocol):
    """What a subject may rely on. See CONTRACT: the subject.

    `dtype` is what to compute in (float64 in structural mode, else the deployed dtype),
    `weight_dtype` what the checkpoint would be stored in. Collectives are functional: they return
    the result and leave `x` alone. At size 1 every collective is the identity.
    """

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def weight(
        self,
        name: str,
        *shape: int,
        std: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Return the full logical tensor `name`, the same values on every rank and degree.

        Normal values, a function of (case seed, name); std defaults to 1/sqrt(last dim) for two
        or more dims and 0.5 for one. Rounded to `weight_dtype`, then cast to `dtype`.

        Raises:
            SubjectError: the same name asked again with another shape, std or dtype.
        """
        ...

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (HF name, full tensor) lazily, for a model's own `load_weights(...)`."""
        ...

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce over ranks with sum, max, min or avg. Returns the shape and dtype of `x`."""
        ...

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's `x` along `dim`, in rank order."""
        ...

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Sum over ranks, then keep this rank's piece along `dim`."""
        ...

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        """Send piece r along `split_dim` to rank r; concatenate what arrives along `concat_dim`."""
        ...

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Return rank `src`'s `x`."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    @property
    def process_group(self) -> Any:
        """The torch.distributed ProcessGroup, for code that calls torch.distributed itself."""
        ...

    @property
    def mesh(self) -> Any:
        """A 1-D DeviceMesh named "tp"."""
        ...


Interceptor = Callable[
    ["RecordedGroup", Collective, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]],
    torch.Tensor,
]
"""(group, call, x, run) -> result. `run(x)` does the collective; a check may look at x, change it,
change the result, or not run it at all. It is called at size 1 too."""


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as reports print it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


class Recorder:
    """The log of one rank's collectives, and whoever wants to know what is in flight.

    `on_enter(call)` and `on_exit()` let the pool publish the operation in flight to the parent;
    `fqn` is the module being executed, kept by execution's trace hooks; `inside` is true while a
    TPGroup collective runs, so that what it calls below is not logged a second time. `on_send(op,
    detail, operands)` is asked before a TPGroup collective, when somebody follows its operands.
    """

    def __init__(
        self,
        on_enter: Callable[[Collective], None] | None = None,
        on_exit: Callable[[], None] | None = None,
    ) -> None:
        self.calls: list[Collective] = []
        self.fqn = ""
        self.inside = False
        self.on_send: Callable[[str, str, tuple[torch.Tensor, ...]], None] | None = None
        self._sequence = 0
        self._on_enter = on_enter
        self._on_exit = on_exit

    def enter(self, op: str, shape: tuple[int, ...], dtype: str, detail: str) -> Collective:
        call = Collective(self._sequence, op, shape, dtype, detail, self.fqn)
        self._sequence += 1
        self.calls.append(call)
        self.inside = True
        if self._on_enter is not None:
            self._on_enter(call)
        return call

    def exit(self) -> None:
        self.inside = False
        if self._on_exit is not None:
            self._on_exit()

    def take(self) -> tuple[Collective, ...]:
        """Return the calls logged since the last take, and forget them."""
        calls, self.calls = tuple(self.calls), []
        return calls


class RecordedGroup:
    """Everything of TPGroup that does not depend on how ranks talk.

    A subclass gives the primitives `_all_reduce(x, op)`, `_all_gather(x, dim)`,
    `_reduce_scatter(x, dim)`, `_all_to_all(x, split_dim, concat_dim)`, `_broadcast(x, src)`,
    `_barrier()` (called at size > 1 only, arguments already checked, dims non-negative) and the
    properties `process_group` and `mesh`.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        weights: WeightSource,
        recorder: Recorder,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.dtype = dtype
        self.weight_dtype = weight_dtype
        self.weights = weights
        self.recorder = recorder
        self.interceptor: Interceptor | None = None
        self.lent = False
        """Whether the subject was given a process group or a mesh for calls of its own."""

    def weight(
        self,
        name: str,
        *shape: int,
        std: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        tensor: torch.Tensor = self._unseen(
            lambda: self.weights.weight(name, shape, std=std, dtype=dtype)
        )
        return tensor if tensor.device == self.device else tensor.to(self.device)

    def _unseen(self, draw: Callable[[], Any]) -> Any:
        """Return what is drawn: its rounding to `weight_dtype` is none of the subject's casts."""
        self.recorder.inside = True
        try:
            return draw()
        finally:
            self.recorder.inside = False

    def digest(self, name: str, output: torch.Tensor) -> str:
        """Return the digest of what this rank gave for the input of that name."""
        return digest(output)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        weights = iter(self.weights.named())
        while (named := self._unseen(lambda: next(weights, None))) is not None:
            yield named[0], named[1].to(self.device)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self._check_tensor("all_reduce", x)
        if op not in REDUCE_OPS:
            raise SubjectError(
                f"all_reduce: op={op!r}, but should be one of {', '.join(REDUCE_OPS)}"
            )
        return self._call("all_reduce", x, op, lambda t: self._all_reduce(t, op))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._check_tensor("all_gather", x)
        dim = self._check_dim("all_gather", x, dim)
        return self._call("all_gather", x, f"dim={dim}", lambda t: self._all_gather(t, dim))

    def reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        self._check_tensor("reduce_scatter", x)
        dim = self._check_split("reduce_scatter", x, dim)
        return self._call("reduce_scatter", x, f"dim={dim}", lambda t: self._reduce_scatter(t, dim))

    def all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        self._check_tensor("all_to_all", x)
        split = self._check_split("all_to_all", x, split_dim)
        concat = self._check_dim("all_to_all", x, concat_dim)
        detail = f"split_dim={split}, concat_dim={concat}"
        return self._call("all_to_all", x, detail, lambda t: self._all_to_all(t, split, concat))

    def broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        self._check_tensor("broadcast", x)
        if not 0 <= src < self.size:
            raise SubjectError(f"broadcast: src={src}, but should be a rank below {self.size}")
        return self._call("broadcast", x, f"src={src}", lambda t: self._broadcast(t, src))

    def barrier(self) -> None:
        self.recorder.enter("barrier", (), "", "")
        try:
            if self.size > 1:
                self._barrier()
        finally:
            self.recorder.exit()

    def _call(
        self,
        op: str,
        x: torch.Tensor,
        detail: str,
        primitive: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        run = primitive if self.size > 1 else _copied
        recorder = self.recorder
        if recorder.on_send is not None:
            recorder.on_send(op, detail, (x,))
        call = recorder.enter(op, tuple(x.shape), dtype_name(x.dtype), detail)
        try:
            if self.interceptor is not None:
                return self.interceptor(self, call, x, run)
            return run(x)
        finally:
            recorder.exit()

    def _check_tensor(self, op: str, x: object) -> None:
        if not isinstance(x, torch.Tensor):
            raise SubjectError(f"{op}: x={type(x).__name__}, but should be a tensor")

    def _check_dim(self, op: str, x: torch.Tensor, dim: int) -> int:
        if not -x.ndim <= dim < x.ndim:
            raise SubjectError(f"{op}: dim={dim}, but should be a dim of shape {list(x.shape)}")
        return dim % x.ndim

    def _check_split(self, op: str, x: torch.Tensor, dim: int) -> int:
        dim = self._check_dim(op, x, dim)
        if x.shape[dim] % self.size:
            raise SubjectError(
                f"{op}: shape[{dim}]={x.shape[dim]}, but should divide by tp_size={self.size};"
                " pad it before the call (uneven splits are the subject's to pad)"
            )
        return dim

    # The primitives of an implementation.
    def _all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        raise NotImplementedError

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        raise NotImplementedError

    def _reduce_scatter(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        raise NotImplementedError

    def _all_to_all(self, x: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        raise NotImplementedError

    def _broadcast(self, x: torch.Tensor, src: int) -> torch.Tensor:
        raise NotImplementedError

    def _barrier(self) -> None:
        raise NotImplementedError

    @property
    def process_group(self) -> Any:
        raise NotImplementedError

    @property
    def mesh(self) -> Any:
        raise NotImplementedError
