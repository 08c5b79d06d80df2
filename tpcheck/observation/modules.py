"""Trace points: which modules of a subject are recorded, and how they are replayed.

Requirement: the first module that leaves its reference has to be found in code we did not write.
`forward.trace_points` names modules, with placements where the author declared them; a plain
nn.Module is traced at every named submodule, also one that a function closes over. Where
placements are declared a module is also run on the reference's own input, so an upstream error is
not blamed on what follows. Code without any module is traced at its collectives.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.groups.base import RecordedGroup
from tpcheck.observation.whereabouts import call_site
from tpcheck.placement import Placement, Replicate, Shard
from tpcheck.sharding import shard
from tpcheck.trace import Collective

_MOST_OBJECTS = 10_000
"""Looked at for modules that a forward holds: what has more of them holds data."""


@dataclass(frozen=True, slots=True)
class TracePoint:
    """A module to trace; placements are None where the subject did not declare them."""

    module: torch.nn.Module
    in_placement: Placement | None = None
    out_placement: Placement | None = None


@dataclass(slots=True)
class PointRecord:
    """What one call of a traced module took and gave on one rank.

    finished: position in the order in which calls returned; an inner module returns before the
    one around it. partials: (call, operand, result) of the module's own sums over ranks.
    exchanged: it is an all-to-all, and what a rank holds came from all of them.
    """

    input: torch.Tensor | None
    output: torch.Tensor | None = None
    in_placement: Placement | None = None
    out_placement: Placement | None = None
    finished: int = -1
    partials: list[tuple[Collective, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    exchanged: bool = False


def traced_modules(forward: Any) -> dict[str, TracePoint]:
    """Return FQN -> trace point: what the subject declares, else its named submodules.

    Raises:
        SubjectError: `trace_points` is no dict of modules or (module, in, out) tuples.
    """
    declared = getattr(forward, "trace_points", None)
    if declared is None:
        return {
            fqn: TracePoint(module)
            for name, held in held_modules(forward).items()
            for fqn, module in held.named_modules(prefix=name)
            if fqn and not isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
        }
    if not isinstance(declared, Mapping):
        raise SubjectError(
            "forward.trace_points should be a dict FQN -> module or (module, in, out)"
        )
    return {str(fqn): _point(str(fqn), entry) for fqn, entry in declared.items()}


def held_modules(forward: Any) -> dict[str, torch.nn.Module]:
    """Return prefix -> the modules that a forward is, closes over or is called with as its own.

    Most models take more than tokens (positions, a mask, a cache), so what a subject returns is
    often `lambda ids: model(ids, positions)`, or a method of what runs the model. One module alone
    has no prefix.
    """
    while isinstance(forward, functools.partial):
        forward = forward.func
    owner = getattr(forward, "__self__", forward)
    if isinstance(owner, torch.nn.Module):
        return {"": owner}
    contents = _closed_over(owner) if inspect.isfunction(owner) else getattr(owner, "__dict__", {})
    held = {name: one for name, one in contents.items() if isinstance(one, torch.nn.Module)}
    inner = {id(one) for module in held.values() for one in list(module.modules())[1:]}
    held = {name: module for name, module in held.items() if id(module) not in inner}
    return {"": next(iter(held.values()))} if len(held) == 1 else held


def _closed_over(function: FunctionType) -> dict[str, Any]:
    found = {}
    cells = function.__closure__ or ()
    for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            found[name] = cell.cell_contents
    return found


def evaluating(forward: Any) -> Any:
    """Return a forward, the modules in its reach in eval mode: dropout is no bug of a split."""
    for module in _within_reach(forward):
        try:
            module.eval()
        except NotImplementedError:  # an exported program within it cannot be asked
            for inner in module.modules():
                inner.training = False
    return forward


def _within_reach(forward: Any) -> Iterator[torch.nn.Module]:
    """Yield the modules that a forward is, closes over or holds, however it holds them."""
    left, seen = [forward], set[int]()
    while left and len(seen) < _MOST_OBJECTS:
        one = left.pop()
        if id(one) in seen or isinstance(one, (torch.Tensor, RecordedGroup, ModuleType, type)):
            continue
        seen.add(id(one))
        if isinstance(one, torch.nn.Module):
            yield one
        elif isinstance(one, functools.partial):
            left += [one.func, *one.args, *one.keywords.values()]
        elif isinstance(one, (list, tuple)):
            left += one
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, FunctionType):
            left += _closed_over(one).values()
        elif isinstance(one, MethodType):
            left += [one.__self__, one.__func__]
        else:
            left += getattr(one, "__dict__", {}).values()


def _point(fqn: str, entry: Any) -> TracePoint:
    module, placements = (entry[0], entry[1:]) if isinstance(entry, tuple) else (entry, ())
    ok = isinstance(module, torch.nn.Module) and len(placements) in (0, 2)
    if not ok or not all(p is None or isinstance(p, Placement) for p in placements):
        raise SubjectError(
            f"forward.trace_points[{fqn!r}]={entry!r}, but should be an nn.Module"
            " or (nn.Module, in_placement, out_placement)"
        )
    return TracePoint(module, *placements)


@contextlib.contextmanager
def fqn_hooks(forward: Any, group: RecordedGroup) -> Iterator[None]:
    """While open, `group.recorder.fqn` names the innermost traced module being executed."""
    handles = []
    recorder = group.recorder
    stack: list[str] = []
    for fqn, point in traced_modules(forward).items():

        def enter(_module: Any, _args: Any, fqn: str = fqn) -> None:
            stack.append(fqn)
            recorder.fqn = fqn

        def leave(_module: Any, _args: Any, _output: Any, fqn: str = fqn) -> None:
            if stack and stack[-1] == fqn:  # else a hook before ours raised: it was never entered
                stack.pop()
            recorder.fqn = stack[-1] if stack else ""

        handles.append(point.module.register_forward_pre_hook(enter))
        handles.append(point.module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        recorder.fqn = ""
        for handle in handles:
            handle.remove()


class ModuleTracer:
    """Records every traced module's first tensor argument and output, in execution order.

    A module called again gets the name `fqn#2`. With `until`, nothing after that FQN's first call
    is recorded. Inputs are kept on every rank, because what goes in may be off already.
    """

    def __init__(
        self, points: Mapping[str, TracePoint], group: RecordedGroup, *, until: str = ""
    ) -> None:
        if until and until not in points:
            some = ", ".join(list(points)[:5])
            known = f"there are: {some}, ..." if points else "the subject traces none"
            raise SubjectError(f"until={until!r} is not a traced module; {known}")
        self.records: dict[str, PointRecord] = {}
        self._points = points
        self._group = group
        self._until = until
        self.outside: list[tuple[Collective, torch.Tensor, torch.Tensor]] = []
        """Sums over ranks that no traced module makes, as `PointRecord.partials`."""
        self.calls: dict[str, PointRecord] = {}
        """Where there are no modules: every collective, as `all_reduce at model.py:42`."""
        self._open: list[tuple[str, PointRecord]] = []
        self._done = False
        self._finished = 0
        self._handles: list[Any] = []
        self._interceptor = group.interceptor

    def __enter__(self) -> ModuleTracer:
        for fqn, point in self._points.items():
            self._handles.append(
                point.module.register_forward_pre_hook(self._enter(fqn, point), with_kwargs=True)
            )
            self._handles.append(
                point.module.register_forward_hook(self._leave(fqn), always_call=True)
            )
        self._group.interceptor = self._tap
        return self

    def __exit__(self, *_: object) -> None:
        self._group.interceptor = self._interceptor
        self._group.recorder.fqn = ""
        for handle in self._handles:
            handle.remove()

    def _enter(self, fqn: str, point: TracePoint) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((a for a in (*args, *kwargs.values()) if _is_tensor(a)), None)
            record = PointRecord(_plain(first), None, point.in_placement, point.out_placement)
            self._open.append((fqn, record))
            self._group.recorder.fqn = fqn
            if not self._done:
                count = sum(name.split("#")[0] == fqn for name in self.records)
                self.records[fqn if count == 0 else f"{fqn}#{count + 1}"] = record

        return hook

    def _leave(self, fqn: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if not self._open or self._open[-1][0] != fqn:
                return  # a hook before ours raised: it was never entered
            _, record = self._open.pop()
            self._group.recorder.fqn = self._open[-1][0] if self._open else ""
            record.output = _plain(_first(output))
            record.finished, self._finished = self._finished, self._finished + 1
            self._done = self._done or fqn == self._until

        return hook

    def _tap(self, group: RecordedGroup, call: Collective, x: torch.Tensor, run: Any) -> Any:
        result = run(x)
        sums = call.op in ("all_reduce", "reduce_scatter") and call.detail not in ("max", "min")
        if group.size != self._group.size:  # it is over some of the ranks
            return result
        seen = (call, x.detach().cpu().clone(), result.detach().cpu().clone())
        if sums:
            (self._open[-1][1].partials if self._open else self.outside).append(seen)
        if not self._points:
            self._note_call(*seen, sums=sums)
        return result

    def _note_call(
        self, call: Collective, x: torch.Tensor, result: torch.Tensor, *, sums: bool
    ) -> None:
        name = f"{call.op} at {call_site()}"
        count = sum(known.split("#")[0] == name for known in self.calls)
        places: dict[str, Placement] = {"reduce_scatter": Shard(call.dim)}
        places |= dict.fromkeys(("all_reduce", "all_gather", "broadcast"), Replicate())
        self.calls[name if count == 0 else f"{name}#{count + 1}"] = PointRecord(
            input=None,
            output=result,
            out_placement=places.get(call.op),
            finished=len(self.calls),
            partials=[(call, x, result)] if sums else [],
            exchanged=call.op == "all_to_all",
        )


def replay_modules(
    points: Mapping[str, TracePoint],
    reference: Mapping[str, torch.Tensor],
    group: RecordedGroup,
    tracer: ModuleTracer,
) -> dict[str, PointRecord]:
    """Run each module with declared placements on the reference's input; return what it gave.

    Every rank replays the same modules in the same order, because modules may hold collectives.
    """
    replayed: dict[str, PointRecord] = {}
    for fqn, full in reference.items():
        point = points.get(fqn)
        if point is None or point.in_placement is None or fqn not in tracer.records:
            continue
        local = shard(full.to(group.device), point.in_placement, group.rank, group.size)
        single = ModuleTracer({fqn: point}, group)
        with single:
            point.module(local)
        replayed[fqn] = single.records[fqn]
    group.recorder.take()
    return replayed


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _first(output: Any) -> Any:
    if isinstance(output, (tuple, list)):
        return next((value for value in output if _is_tensor(value)), None)
    return output


def _plain(tensor: Any) -> torch.Tensor | None:
    if not isinstance(tensor, torch.Tensor):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # one of many, inside vmap
        return None
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().to("cpu").clone()
