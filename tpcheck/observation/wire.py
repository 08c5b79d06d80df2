"""Sums over ranks, carried in another dtype, and what went over the wire.

Requirement: "what would float32 on the wire buy?" is answered by this subject, not by a law. Every
sum over ranks is cast to the wire's dtype, reduced by the ranks' own reduction and cast back; the
kinds of numerics/low_precision.py are emulated on gathered operands, so that they can be had on any
backend. Nothing else changes, so what differs is the wire.

[Rounded Before] An operand has been rounded to the activations' dtype when it arrives here: a wider
wire saves the roundings of the sum, not those of the terms. A kernel that hands its accumulator on
unrounded saves those too.
[No Saturation] A cast to float16 makes infinities of what float16 cannot hold, as engines' casts
do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tpcheck.groups.base import RecordedGroup
from tpcheck.numerics.low_precision import LOW_PRECISION, carried_as
from tpcheck.numerics.reduction import reduce_sum
from tpcheck.trace import Collective

PLAIN_WIRES = ("float32", "float16", "bfloat16")

_SUMS = ("all_reduce", "reduce_scatter")


@dataclass(slots=True)
class Seen:
    """What one rank saw of its sums: how many per operand dtype, and the largest of their values.

    Magnitudes are of finite elements. `overflowed`: results that are not finite although this
    rank's own operand was. `largest_at`: the module that had the largest partial, if any is traced.
    """

    dtypes: dict[str, int] = field(default_factory=dict)
    largest_partial: float = 0.0
    largest_sum: float = 0.0
    largest_at: str = ""
    overflowed: int = 0

    @property
    def sums(self) -> int:
        """How many sums there were."""
        return sum(self.dtypes.values())

    def note(self, call: Collective, operand: torch.Tensor, result: torch.Tensor) -> None:
        """Remember one sum of this rank."""
        self.dtypes[call.dtype] = self.dtypes.get(call.dtype, 0) + 1
        largest = _largest(operand)
        if largest > self.largest_partial:
            self.largest_partial, self.largest_at = largest, call.fqn
        self.largest_sum = max(self.largest_sum, _largest(result))
        if bool(operand.isfinite().all()):
            self.overflowed += int((~result.isfinite()).sum())


class Wire:
    """An interceptor that carries every sum in `wire`; "" leaves it as the subject asks for it."""

    def __init__(self, wire: str = "") -> None:
        if wire and wire not in PLAIN_WIRES and wire not in LOW_PRECISION:
            known = ", ".join((*PLAIN_WIRES, *LOW_PRECISION))
            raise ValueError(f"wire={wire!r}, but should be one of {known}")
        self.seen = Seen()
        self._wire = wire

    def __call__(
        self,
        group: RecordedGroup,
        call: Collective,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the sum as the wire carries it; what is no sum of floats runs as it is."""
        sums = call.op in _SUMS and call.detail not in ("max", "min")
        if group.size == 1 or not sums or not x.is_floating_point():
            return run(x)
        result = self._carried(group, call, x, run)
        self.seen.note(call, x, result)
        return result

    def _carried(
        self,
        group: RecordedGroup,
        call: Collective,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        if not self._wire:
            return run(x)
        if self._wire in PLAIN_WIRES:
            return run(x.to(getattr(torch, self._wire))).to(x.dtype)
        terms = group._all_gather(x.unsqueeze(0), 0).unbind(0)
        total = reduce_sum(list(terms), self._wire)
        if call.detail == "avg":
            total = total / group.size
        if call.op == "reduce_scatter":
            total = total.chunk(group.size, call.dim)[group.rank].contiguous()
        return total


def wires_for(dtype: str) -> tuple[str, ...]:
    """Return the wires that sums of a dtype can be carried in, the dtype's own first.

    `fp16_wire` is left out: it is float16, which the ranks' own reduction adds up.
    """
    plain = [wire for wire in PLAIN_WIRES if wire != dtype]
    named = getattr(torch, dtype)
    low = [kind for kind in LOW_PRECISION if carried_as(kind, named) == kind != "fp16_wire"]
    return (dtype, *plain, *low)


def _largest(x: torch.Tensor) -> float:
    finite = x.masked_fill(~x.isfinite(), 0.0)
    return float(finite.abs().max()) if x.numel() else 0.0
