"""Collectives that a subject asks of torch.distributed itself, handed to an interceptor.

Requirement: what is asked of sums over ranks (which rounding they must cost, what another wire
buys, which fault in them would show) is asked of code that knows nothing of TPGroup too. A dispatch
mode sees both the in-place calls and the functional ones that DTensor makes, below autograd.

[Own Tensors] A call is made on tensors of ours: Gloo's reduce-scatter writes to its output whenever
its handle is waited for, and the subject waits last.
[Waited For] A call is over when the interceptor returns, also one made with async_op=True: its
handle is then done. A forward that reads before it waits gives right numbers here, and its own
elsewhere: this is for numbers, not for judging.
[Other Groups] The ranks of a call are those of its process group, whichever that is: terms are
gathered there, so groups of some of the ranks are seen like the whole world.
[Missed] Coalesced collectives, and pieces of several shapes, are left as they are. They are counted
in `missed`, so that no number rests on sums whose terms were not seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import _C
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from tpcheck.groups.base import Interceptor, RecordedGroup
from tpcheck.observation.dispatch_mode import PlainMode
from tpcheck.trace import Collective

Run = Callable[[torch.Tensor], torch.Tensor]

_FUNCTIONAL = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
}
"""torch.distributed's functional collectives, by the name they have in TPGroup."""

_REDUCE_CODES = {0: "sum", 1: "avg", 3: "min", 4: "max"}
"""c10d's ReduceOp, as it arrives at a dispatch mode."""


class Peers(RecordedGroup):
    """The ranks of one of the subject's own process groups, as an interceptor asks of them."""

    def __init__(self, group: RecordedGroup, process_group: Any) -> None:
        super().__init__(
            rank=dist.get_rank(process_group),
            size=dist.get_world_size(process_group),
            device=group.device,
            dtype=group.dtype,
            weight_dtype=group.weight_dtype,
            weights=group.weights,
            recorder=group.recorder,
        )
        self._process_group = process_group

    def _all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        mine = x.detach().contiguous()
        pieces = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(pieces, mine, group=self._process_group)
        return torch.cat(pieces, dim)


class OwnCalls(PlainMode):
    """While active, sends the torch.distributed calls of the subject's own through `intercept`.

    It is called with the ranks of the call's process group. `missed` counts reductions that were
    left as they are, by the name of the op.
    """

    def __init__(self, group: RecordedGroup, intercept: Interceptor) -> None:
        super().__init__()
        self.missed: dict[str, int] = {}
        self._group = group
        self._intercept = intercept
        self._peers: dict[str, tuple[RecordedGroup, str]] = {}
        self._counts: dict[str, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass_type(one) for one in types):
            return NotImplemented  # a DTensor first turns into the collectives it is made of
        space, _, name = func.name().partition("::")
        if not self._group.recorder.inside:
            if space == "c10d" and name in _IN_PLACE:
                return self._in_place(name, func, args, kwargs)
            if space == "_c10d_functional" and name in _FUNCTIONAL:
                return self._functional(name, func, args, kwargs)
            if space in ("c10d", "_c10d_functional") and "reduce" in name:
                self._miss(name)
        return func(*args, **kwargs)

    def _functional(self, name: str, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        op, x = _FUNCTIONAL[name], args[0]
        target = x.clone() if name == "all_reduce_" else x
        out = kwargs.get("out")

        def run(operand: torch.Tensor) -> torch.Tensor:
            named = {} if out is None else {"out": torch.empty_like(out, dtype=operand.dtype)}
            given = operand.clone() if name == "all_reduce_" else operand.contiguous()
            result = func(given, *args[1:], **named)
            waited: torch.Tensor = torch.ops._c10d_functional.wait_tensor(result)
            return waited

        detail = str(args[1]) if op == "all_reduce" else _cut(args[1])
        result = self._called(op, detail, target, run, _resolved(args[-1]))
        written = x if name == "all_reduce_" else out
        return result if written is None else written.copy_(result)

    def _in_place(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        call = _IN_PLACE[name](args)
        if _uneven(call.reads) or _uneven(call.writes):
            if "reduce" in name:
                self._miss(f"{name} of several shapes")
            return func(*args, **kwargs)  # uneven pieces are no one tensor
        returned: Any = None

        def run(operand: torch.Tensor) -> torch.Tensor:
            nonlocal returned
            given = _pieces(operand, len(call.reads))
            reads = [piece.clone(memory_format=torch.contiguous_format) for piece in given]
            writes = reads
            if not call.in_place:
                writes = [torch.empty_like(one, dtype=operand.dtype) for one in call.writes]
            result = func(*call.arguments(reads, writes), **kwargs)
            dist.Work.unbox(result[-1] if isinstance(result, (tuple, list)) else result).wait()
            returned = result if returned is None else returned
            if call.root is not None:  # elsewhere is nobody's sum: an interceptor may look at all
                dist.broadcast(writes[0], group=call.process_group, group_src=call.root)
            return torch.stack(writes) if len(writes) > 1 else writes[0].clone()

        operand = call.reads[0].clone() if len(call.reads) == 1 else torch.cat(call.reads)
        result = self._called(call.op, call.detail, operand, run, call.process_group)
        if returned is None:
            run(operand)  # an emulated sum; the handle is a real one's
        if call.root is not None and call.root != dist.get_rank(call.process_group):
            return returned
        for one, value in zip(
            call.writes, result if len(call.writes) > 1 else [result], strict=True
        ):
            one.copy_(value.view_as(one))
        return returned

    def _called(
        self, op: str, detail: str, x: torch.Tensor, run: Run, process_group: Any
    ) -> torch.Tensor:
        name, world = str(process_group.group_name), dist.group.WORLD
        if name not in self._peers:
            own = world is not None and name == world.group_name
            ranks = "world" if own else str(dist.get_process_group_ranks(process_group))
            group = self._group if own else Peers(self._group, process_group)
            self._peers[name] = (group, ranks)
        group, ranks = self._peers[name]
        count = self._counts[name] = self._counts.get(name, 0) + 1
        # The same number on every rank of the group, and another one for every call.
        sequence = zlib.crc32(f"{ranks}:{count}".encode())
        dtype = str(x.dtype).removeprefix("torch.")
        fqn = self._group.recorder.fqn
        call = Collective(sequence, op, tuple(x.shape), dtype, detail, fqn)
        return self._intercept(group, call, x, run)

    def _miss(self, name: str) -> None:
        self.missed[name] = self.missed.get(name, 0) + 1


def sums_of(group: RecordedGroup) -> Interceptor:
    """Return an interceptor that hands sums of the subject's own to whatever `group` has now."""

    def intercept(
        peers: RecordedGroup, call: Collective, x: torch.Tensor, run: Run
    ) -> torch.Tensor:
        sums = call.op in ("all_reduce", "reduce_scatter") and (
            call.detail in ("sum", "avg") or call.detail.startswith("dim=")
        )
        if not sums or group.interceptor is None or not x.is_floating_point():
            return run(x)
        return group.interceptor(peers, call, x, run)

    return intercept


@dataclass(frozen=True, slots=True)
class _InPlace:
    """One in-place call: what it reads and writes, and its arguments for other tensors."""

    op: str
    reads: list[torch.Tensor]
    writes: list[torch.Tensor]
    detail: str
    process_group: Any
    arguments: Callable[[list[torch.Tensor], list[torch.Tensor]], tuple[Any, ...]]
    root: int | None = None

    @property
    def in_place(self) -> bool:
        """Whether it writes what it reads; one piece of several may be the operand itself."""
        return [id(one) for one in self.reads] == [id(one) for one in self.writes]


def _all_reduce(args: Any) -> _InPlace:
    x, group = args[0][0], _unboxed(args[1])
    detail = _reduction(args[2])
    return _InPlace("all_reduce", [x], [x], detail, group, lambda r, w: (r, *args[1:]))


def _reduce(args: Any) -> _InPlace:
    call = _all_reduce(args)
    return _InPlace(
        "all_reduce",
        call.reads,
        call.writes,
        call.detail,
        call.process_group,
        call.arguments,
        root=int(args[3]),
    )


def _reduce_scatter_base(args: Any) -> _InPlace:
    detail = _cut(_reduction(args[3]))
    return _InPlace(
        "reduce_scatter",
        [args[1]],
        [args[0]],
        detail,
        _unboxed(args[2]),
        lambda r, w: (w[0], r[0], *args[2:]),
    )


def _reduce_scatter(args: Any) -> _InPlace:
    detail = _cut(_reduction(args[3]))
    return _InPlace(
        "reduce_scatter",
        list(args[1][0]),
        [args[0][0]],
        detail,
        _unboxed(args[2]),
        lambda r, w: (w, [r], *args[2:]),
    )


def _all_gather_base(args: Any) -> _InPlace:
    group = _unboxed(args[2])
    return _InPlace(
        "all_gather",
        [args[1]],
        [args[0]],
        "dim=0",
        group,
        lambda r, w: (w[0], r[0], *args[2:]),
    )


def _all_gather(args: Any) -> _InPlace:
    group = _unboxed(args[2])
    return _InPlace(
        "all_gather",
        [args[1][0]],
        list(args[0][0]),
        "dim=0",
        group,
        lambda r, w: ([w], r, *args[2:]),
    )


_IN_PLACE: dict[str, Callable[[Any], _InPlace]] = {
    "allreduce_": _all_reduce,
    "reduce_": _reduce,
    "_reduce_scatter_base_": _reduce_scatter_base,
    "reduce_scatter_": _reduce_scatter,
    "_allgather_base_": _all_gather_base,
    "allgather_": _all_gather,
}
"""c10d op -> how it is called."""


def _uneven(tensors: Sequence[torch.Tensor]) -> bool:
    return len(tensors) > 1 and (tensors[0].ndim == 0 or len({t.shape for t in tensors}) > 1)


def _pieces(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [x] if count == 1 else list(x.chunk(count))


def _cut(reduction: Any) -> str:
    """Return the detail of what cuts or joins dim 0; none of a reduction that is no sum."""
    return "dim=0" if not isinstance(reduction, str) or reduction == "sum" else reduction


def _reduction(code: Any) -> str:
    return _REDUCE_CODES.get(code.op(), "other")


def _unboxed(process_group: Any) -> Any:
    return dist.ProcessGroup.unbox(process_group)


def _resolved(named: Any) -> Any:
    if isinstance(named, str):
        resolve: Any = _C._distributed_c10d._resolve_process_group
        return resolve(named)
    return named
