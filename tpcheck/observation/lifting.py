"""A forward with its narrow casts lifted: what it computes where no cast of its own rounds.

Requirement: a hard cast to bfloat16 makes a float64 run as noisy as bfloat16, and a bug below that
noise would pass. So the same forward runs once more with every floating dtype below float32 held in
float64, at TP=1 as at TP=N: what still differs is no rounding.

What is written in place keeps its dtype, and so does what was made narrow in build: such casts stay
and are measured as ever. What cannot be followed is refused, and nothing then rests on this run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.groups.base import Recorder
from tpcheck.observation.codes import TO_INTEGERS, plain_name
from tpcheck.observation.dispatch_mode import PlainMode

_NARROW = frozenset({torch.bfloat16, torch.float16})
_FLOAT_CODES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_CODES = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})
"""What a quantizer of integers gives, and what its integers are added up in."""
_DISTRIBUTED = ("c10d", "_c10d_functional")


class Unliftable(RuntimeError):
    """An op that may read its operands' bytes, or that nobody here knows."""


class Lift(PlainMode):
    """Compute in `wide` whatever a forward would compute in a dtype below float32.

    Args:
        recorder: says when a TPGroup's own code runs, which is left alone.
        wide: the dtype to compute in.
        codes: lift quantizers as well: round and its like give what they were given, and what was
            cast to 8 bits or to integers, or is viewed as bytes to be sent, stays what it is.

    Raises:
        Unliftable: from an op that reads bits as another dtype, or is not torch's own.
    """

    def __init__(self, recorder: Recorder, wide: torch.dtype, *, codes: bool = False) -> None:
        super().__init__()
        self._recorder = recorder
        self._wide = wide
        self._codes = codes
        self._narrow = _NARROW | _FLOAT_CODES if codes else _NARROW

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._recorder.inside or func.namespace in _DISTRIBUTED:
            return func(*args, **kwargs)
        name = func.name()
        if name == "aten::view.dtype" and self._codes and self._stands_for_bytes(*args):
            return args[0].view(args[0].shape)
        if func.namespace not in ("aten", "prims") or name == "aten::view.dtype":
            raise Unliftable(f"{name} cannot be computed in {self._wide}")
        if self._codes and plain_name(func) in TO_INTEGERS:
            return args[0].clone()
        if self._codes and name == "aten::_to_copy" and args[0].dtype.is_floating_point:
            kwargs = _cast(kwargs, self._wide, _CODES)
        if _shares_memory(func):
            return func(*args, **kwargs)
        places, names = _written(func)
        targets = [args[i] for i in places if i < len(args)] + [kwargs.get(n) for n in names]
        dtypes = {x.dtype for x in targets if isinstance(x, torch.Tensor)}
        if self._codes and dtypes & _CODES:
            raise Unliftable(f"{name} writes to integers, which may be codes")
        narrow = dtypes & self._narrow
        to, only = (narrow.pop(), None) if narrow else (self._wide, self._narrow)
        return func(
            *(x if i in places else _cast(x, to, only) for i, x in enumerate(args)),
            **{key: x if key in names else _cast(x, to, only) for key, x in kwargs.items()},
        )

    def _stands_for_bytes(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        return x.dtype == self._wide and dtype.itemsize == 1


def _cast(value: Any, to: torch.dtype, only: frozenset[torch.dtype] | None = None) -> Any:
    """Return arguments with floating tensors and dtypes in `to`, those of `only` if it is given."""
    if isinstance(value, torch.Tensor):
        asked = value.dtype.is_floating_point if only is None else value.dtype in only
        return value.to(to) if asked else value
    if isinstance(value, torch.dtype):
        return to if only is not None and value in only else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(one, to, only) for one in value)
    if isinstance(value, Mapping):
        return {key: _cast(one, to, only) for key, one in value.items()}
    return value


@functools.cache
def _shares_memory(func: Any) -> bool:
    """A view in another dtype would lose what is written through it."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@functools.cache
def _written(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Return where an op's arguments stand that it writes to, and what they are called."""
    arguments = enumerate(func._schema.arguments)
    own = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return frozenset(i for i, _ in own), frozenset(name for _, name in own)
