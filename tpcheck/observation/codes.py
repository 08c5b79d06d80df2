"""Quantizers in a forward: which are part of the function, and which round what ranks send.

Requirement: a cast to 8 bits in a layer is the function's own, at every degree the same: moving
what it gives by half an ulp, a quantum, would declare every bug below a quantum to be noise. A cast
of what is then summed over ranks is the reduction's rounding, as any narrow wire is.

[Sent] A cast is the reduction's where what it gives reaches a sum over ranks before anything is
multiplied out with it; where TP=1 makes no such cast, any collective will do, because some engines
gather what they send and sum it themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from tpcheck.groups.base import dtype_name

CastKey = tuple[str, str, str]
"""The module's FQN, the source dtype, the target dtype."""

_INTEGERS = "integers"
_TO_INTEGERS = {"aten::round", "aten::floor", "aten::ceil", "aten::trunc"}

_EIGHT_BITS = (torch.int8, torch.uint8)
"""What floating values become in a quantizer of integers, rounded first or not."""

_PRODUCTS = {
    f"aten::{name}"
    for name in (
        "mm addmm bmm baddbmm addbmm mv addmv dot linear matmul einsum convolution _scaled_mm"
        " _grouped_mm _int_mm _scaled_dot_product_flash_attention_for_cpu"
        " _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention"
        " _scaled_dot_product_cudnn_attention"
    ).split()
}
"""What multiplies a tensor out with another: what it gives is no longer the cast's."""

_SUMS = {"all_reduce", "reduce_scatter", "reduce"}


class Codes:
    """The quantizers of one forward, in order.

    Args:
        alone: the quantizers of TP=1, where this is another degree.
        sent: which casts, by their place in the forward, an earlier run found to be [Sent].
    """

    def __init__(
        self, alone: Collection[CastKey] | None = None, sent: Collection[int] = ()
    ) -> None:
        self.found: dict[CastKey, None] = {}
        self.sent: set[int] = set()
        self.reaching: set[int] = set()
        """Those that some collective sends, [Sent] or not."""
        self._alone = alone
        self._known = frozenset(sent)
        self.casts: list[CastKey] = []
        self._held = WeakIdKeyDictionary()

    def note(
        self, func: Any, fqn: str, source: torch.dtype | None, result: torch.Tensor
    ) -> bool | None:
        """Note what an op gave; say whether that is a code, or rounding, None for neither."""
        if not makes_codes(func, source, result.dtype):
            return None
        integers = rounds(func) or not result.dtype.is_floating_point
        target = _INTEGERS if integers else dtype_name(result.dtype)
        key = (fqn, dtype_name(source or result.dtype), target)
        place = len(self.casts)
        self.casts.append(key)
        self._held[result] = frozenset({place})
        if place in self._known and not integers:
            return False
        self.found[key] = None
        return True

    def follow(self, func: Any, args: Sequence[Any], results: Sequence[Any]) -> None:
        """Note that results hold what the arguments held, unless it was multiplied out."""
        if not self.casts or plain_name(func) in _PRODUCTS:
            return
        places = self._places(args)
        if places:
            for result in results:
                if isinstance(result, torch.Tensor):
                    self._held[result] = places | self._held.get(result, frozenset())

    def send(self, op: str, detail: str, args: Sequence[Any]) -> None:
        """Note that a collective sends what these arguments hold."""
        if not self.casts or (op in _SUMS and detail in ("max", "min")):
            return
        places = self._places(args)
        self.reaching |= places
        for place in places:
            if op in _SUMS or (self._alone is not None and self.casts[place] not in self._alone):
                self.sent.add(place)

    @property
    def rounding(self) -> list[CastKey]:
        """The casts that are [Sent] and have a last place."""
        sent = [self.casts[place] for place in sorted(self.sent)]
        return [key for key in sent if key[2] != _INTEGERS]

    def _places(self, args: Sequence[Any]) -> frozenset[int]:
        held = (self._held.get(tensor) for tensor in _tensors(args))
        return frozenset().union(*(places for places in held if places))


def makes_codes(func: Any, source: torch.dtype | None, target: torch.dtype) -> bool:
    """Whether an op that gives `target` quantizes; `source`: its most precise floating operand."""
    if rounds(func):
        return target.is_floating_point
    if target in _EIGHT_BITS:
        return source is not None
    return target.is_floating_point and target.itemsize == 1 and source not in (None, target)


def rounds(func: Any) -> bool:
    """Whether an op rounds to whole numbers."""
    return plain_name(func) in _TO_INTEGERS


def widest(args: Sequence[Any]) -> torch.dtype | None:
    """Return the most precise floating dtype among tensor arguments (the source of a cast)."""
    best: torch.dtype | None = None
    for arg in args:
        candidates = arg if isinstance(arg, (list, tuple)) else (arg,)
        for value in candidates:
            if isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.ndim:
                if best is None or dtype_eps(value.dtype) < dtype_eps(best):
                    best = value.dtype
    return best


@functools.cache
def dtype_eps(dtype: torch.dtype) -> float:
    """Return torch.finfo(dtype).eps, looked up once."""
    return torch.finfo(dtype).eps


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


@functools.cache
def plain_name(func: Any) -> str:
    """Return an op's name without its overload, or that it writes: `aten::round`."""
    name: str = func.name()
    return name.partition(".")[0].removesuffix("_")
