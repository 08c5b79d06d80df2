"""Clocks for collectives: of a TPGroup, and of code that calls torch.distributed itself.

Requirement: what a forward spends in communication is timed where it is spent, each call to its
end. A clock of torch.distributed sees every operator of the forward, which slows it: whoever times
the forward as well does that without this clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from tpcheck.groups.base import RecordedGroup
from tpcheck.observation.dispatch_mode import PlainMode
from tpcheck.trace import Collective

Call = tuple[str, int, float]
"""(operation, bytes of its operand, seconds)"""

_NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
}
"""Operators of c10d and _c10d_functional that are all-reduces; others go by their own names."""

_BOOKKEEPING = {"wait_tensor", "_wrap_tensor_autograd"}


class GroupClock:
    """An interceptor that times each collective of a TPGroup."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(
        self,
        group: RecordedGroup,
        call: Collective,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        synchronize(group.device)
        started = time.perf_counter()
        result = run(x)
        synchronize(group.device)
        self.calls.append((call.op, x.nbytes, time.perf_counter() - started))
        return result


class DistributedClock(PlainMode):
    """While open, times each collective that reaches torch.distributed, waiting for its end."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace not in ("c10d", "_c10d_functional") or name in _BOOKKEEPING:
            return func(*args, **(kwargs or {}))
        synchronize(self._device)
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        _finish(func.namespace, result)
        synchronize(self._device)
        seconds = time.perf_counter() - started
        nbytes = sum(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        self.calls.append((_NAMES.get(name, name), nbytes, seconds))
        return result


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do; on CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _finish(namespace: str, result: Any) -> None:
    """Wait until a collective is done; its caller's own wait then finds it done."""
    if namespace == "_c10d_functional":
        for tensor in tree_leaves(result):
            torch.ops._c10d_functional.wait_tensor(tensor)
        return
    from torch.distributed import Work

    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.ScriptObject):
            work: Any = Work.unbox(leaf)
            work.wait()
