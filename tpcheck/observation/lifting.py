"""A forward with its narrow casts lifted: what it computes where no cast of its own rounds.

Requirement: a hard cast to bfloat16 makes a float64 run as noisy as bfloat16, and a bug below that
noise would pass. So the same forward runs once more with every floating dtype below float64 held in
float64, at TP=1 as at TP=N: what still differs is no rounding.

What is written in place keeps its dtype: build is lifted too, so that a cache is made as wide as
what is put there, and where build cannot be, such casts stay and are measured as ever. What cannot
be followed is refused, and nothing then rests on this run.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch

from tpcheck.groups.base import Recorder
from tpcheck.observation.codes import makes_codes, rounds, widest
from tpcheck.observation.dispatch import DISTRIBUTED, is_view
from tpcheck.observation.dispatch_mode import PlainMode

_NARROW = frozenset({torch.float32, torch.bfloat16, torch.float16})
_INTEGERS = frozenset({torch.int16, torch.int32})
"""What codes of 8 bits are added up in."""


class Unliftable(RuntimeError):
    """An op that may read its operands' bytes, or that nobody here knows."""


class Lift(PlainMode):
    """Compute in `wide` whatever a forward would compute in a narrower dtype.

    Args:
        recorder: says when a TPGroup's own code runs, which is left alone.
        wide: the dtype to compute in.
        codes: which quantizers to lift as well, by their place in the forward (Codes.sent): these
            give what they were given, and that may be viewed as bytes, or cast to the integers that
            codes are added up in, and stays what it is.

    Raises:
        Unliftable: from an op that reads bits as another dtype, or is not torch's own.
    """

    def __init__(
        self, recorder: Recorder, wide: torch.dtype, *, codes: Collection[int] = ()
    ) -> None:
        super().__init__()
        self._recorder = recorder
        self._wide = wide
        self._codes = frozenset(codes)
        self._place = 0
        self._default = wide

    def __enter__(self) -> Self:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(self._wide)  # of a constant no op is seen: torch.tensor(1 / 3)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._recorder.inside or func.namespace in DISTRIBUTED:
            return func(*args, **kwargs)
        if self._codes and self._is_lifted_code(func, args, kwargs):
            return args[0].to(self._wide, copy=True)
        if func.namespace not in ("aten", "prims") or func.name() == "aten::view.dtype":
            raise Unliftable(f"{func.name()} cannot be computed in {self._wide}")
        if is_view(func):
            return func(*args, **kwargs)
        places, names = written(func)
        targets = [args[i] for i in places if i < len(args)] + [kwargs.get(n) for n in names]
        narrow = {x.dtype for x in targets if isinstance(x, torch.Tensor)} & _NARROW
        to, only = (narrow.pop(), None) if narrow else (self._wide, _NARROW)
        return func(
            *(x if i in places else _cast(x, to, only) for i, x in enumerate(args)),
            **{key: x if key in names else _cast(x, to, only) for key, x in kwargs.items()},
        )

    def _is_lifted_code(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether an op gives codes to lift, or makes something else of codes that were."""
        name, given, asked = func.name(), args[0] if args else None, kwargs.get("dtype")
        if not isinstance(given, torch.Tensor):
            return False
        if name == "aten::view.dtype":
            return given.dtype == self._wide and args[1].itemsize == 1
        if asked is None and not rounds(func) and not written(func)[0]:
            return False
        if not makes_codes(func, widest(args), asked or given.dtype):
            return given.dtype == self._wide and name == "aten::_to_copy" and asked in _INTEGERS
        self._place += 1
        if self._place - 1 not in self._codes:
            return False
        if name != "aten::_to_copy" and (not rounds(func) or written(func)[0]):
            raise Unliftable(f"{name} writes codes to a buffer, or makes one for them")
        return True


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
def written(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Return where an op's arguments stand that it writes to, and what they are called."""
    arguments = enumerate(func._schema.arguments)
    own = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return frozenset(i for i, _ in own), frozenset(name for _, name in own)
