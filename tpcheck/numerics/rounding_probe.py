"""Read how an all-reduce rounds: the dtype on the wire, the accumulator, and what AVG does.

Requirement: two reductions in one order still differ when one rounds every partial sum to bfloat16
and the other keeps float32. Each hypothesis is emulated on inputs that tell it from the others, and
only those stay whose bits were observed, so nothing here is a guess.

[Wire] One rank alone puts in a value and the others zeros: whatever the order, it comes back as
the wire carried it. A wire narrower than the tensor shows so. A wider one cannot be told from a
wider accumulator: they are the same function.
[Half An Ulp] 1 on one rank and half an ulp on the others: rounded away at every hop, or kept.
[Ladder] 2^k, -2^k and ones: an accumulator of fewer than k bits loses ones that a wider one keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tpcheck.numerics.order import Chunk
from tpcheck.numerics.probed_reduction import ANY, ProbedMessage, sum_by_tree, sum_message

_WIRES: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.float16: (torch.bfloat16,),
    torch.bfloat16: (torch.float16,),
    torch.float32: (torch.float16, torch.bfloat16),
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
}
"""What else a tensor may travel as."""

_LADDER = (9, 13, 30)
"""Above the bits of bfloat16 (8), float16 (11) and float32 (24), below those of the next."""


def wire_table(dtype: torch.dtype, world: int) -> Tensor:
    """Return what ranks put in to read the wire: float64, [inputs, world].

    Source: [Wire]; 1 + eps needs the mantissa of a dtype, its largest and smallest normal the
        range. What the narrower wires hold tells them from one another.
    """
    infos = [torch.finfo(one) for one in (dtype, *_WIRES[dtype])]
    values = [value for info in infos for value in (1.0 + info.eps, info.max, info.tiny)]
    held = [one for one in values if torch.tensor(one, dtype=torch.float64).to(dtype) == one]
    return torch.cat([value * torch.eye(world, dtype=torch.float64) for value in held])


def accumulator_table(wire: torch.dtype, world: int) -> Tensor:
    """Return what ranks put in to read the accumulator: float64, [inputs, world].

    Source: [Half An Ulp], [Ladder]. Of neighbouring pairs one at least meets above its own sum,
        where the world is three or more.
    """
    one = torch.eye(world, dtype=torch.float64)
    tables = [one + (1 - one) * torch.finfo(wire).eps / 2]
    pairs = one - one.roll(1, 0)
    for bits in _LADDER:
        top = min(bits, 15)  # float16 holds 2^15 and 2^-15
        leaves = (pairs == 0) * 2.0 ** (top - bits)
        tables.append(pairs * 2.0**top + leaves)
    return torch.cat(tables)


def rounds_needed(inputs: int, share: int) -> int:
    """Return how many messages show all inputs to each `share` elements in a row."""
    return math.ceil(inputs / share)


def laid_out(column: Tensor, count: int, share: int, turn: int) -> Tensor:
    """Return one rank's message of `count` elements from its column of a table, at this turn.

    Neighbouring elements get different inputs, and every turn moves on by a share.
    """
    return column[(torch.arange(count) + turn * share) % len(column)]


def read_wire(operands: Sequence[Tensor], output: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that may have been on the wire, the tensor's own first; none if others.

    Args:
        operands: one per rank, laid out from `wire_table`.
        output: what the all-reduce returned.

    Source: [Wire].
    """
    dtype = output.dtype
    put_in = torch.stack(list(operands)).sum(0)  # one value and zeros
    return tuple(
        wire
        for wire in (dtype, *_WIRES[dtype])
        if same_bits(put_in.to(wire).to(dtype), output).all()
    )


def candidates(wire: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the accumulators to try: the wire's own dtype, which rounds every hop, and wider."""
    wider = (torch.float32, torch.float64)
    bits = torch.finfo(wire).eps
    return (wire, *(one for one in wider if torch.finfo(one).eps < bits))


def read_accumulators(
    chunks: Sequence[Chunk],
    wire: torch.dtype,
    observed: Sequence[tuple[Sequence[Tensor], Tensor]],
) -> tuple[Chunk, ...]:
    """Return the chunks with the accumulator that explains every observed output.

    Where one accumulator explains all chunks, all get it: a chunk too short to have seen every
    input is no exception. None stays where nothing explains what was seen.

    Args:
        observed: (operands, one per rank; output) of each message that was reduced.

    Source: module docstring.
    """
    possible = [_explaining(chunk, wire, observed) for chunk in chunks]
    everywhere = [one for one in candidates(wire) if all(one in each for each in possible)]
    return tuple(
        Chunk(chunk.start, chunk.stop, chunk.tree, _named(everywhere or each, wire, chunk))
        for chunk, each in zip(chunks, possible, strict=True)
    )


def read_average(
    message: ProbedMessage, observed: Sequence[tuple[Sequence[Tensor], Tensor]]
) -> tuple[str, ...]:
    """Return the ways to average that explain every observed output; none if there are others.

    Source: NCCL multiplies by 1/N, rounded to the dtype, before it sums (enqueue.cc,
        hostToDevRedOp); Gloo divides the sum (ProcessGroupGloo).
    """
    return tuple(
        name
        for name, average in _AVERAGES.items()
        if all(same_bits(average(xs, message), output).all() for xs, output in observed)
    )


def average_operands(operands: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return operands whose sum overflows, so that dividing first is told from dividing last.

    Source: three quarters of the largest number on every rank.
    """
    return {
        rank: torch.full_like(x, 0.75 * torch.finfo(x.dtype).max) for rank, x in operands.items()
    }


def same_bits(actual: Tensor, expected: Tensor) -> Tensor:
    """Return where two tensors of one dtype have the same bits; any NaN equals any other."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    same = actual.contiguous().view(bits) == expected.contiguous().view(bits)
    return same | (actual.isnan() & expected.isnan())


def _explaining(
    chunk: Chunk, wire: torch.dtype, observed: Sequence[tuple[Sequence[Tensor], Tensor]]
) -> list[torch.dtype]:
    here = slice(chunk.start, chunk.stop)
    return [
        one
        for one in candidates(wire)
        if all(
            same_bits(sum_by_tree([x[here] for x in xs], chunk.tree, wire, one), output[here]).all()
            for xs, output in observed
        )
    ]


def _named(possible: Sequence[torch.dtype], wire: torch.dtype, chunk: Chunk) -> str | None:
    if not possible:
        return None
    if chunk.tree is None:  # exact, so at least as wide as the widest
        possible = possible[-1:]
    elif len(possible) == len(candidates(wire)) > 1:
        return ANY
    return str(possible[0]).removeprefix("torch.")


def _sum_then_divide(operands: Sequence[Tensor], message: ProbedMessage) -> Tensor:
    return sum_message(operands, message) / message.world


def _sum_then_multiply(operands: Sequence[Tensor], message: ProbedMessage) -> Tensor:
    return sum_message(operands, message) * _share(operands[0], message)


def _multiply_first(operands: Sequence[Tensor], message: ProbedMessage) -> Tensor:
    return sum_message([x * _share(x, message) for x in operands], message)


def _multiply_wide(operands: Sequence[Tensor], message: ProbedMessage) -> Tensor:
    wide = torch.promote_types(operands[0].dtype, torch.float32)
    total = sum_message([x.to(wide) for x in operands], message)
    return (total * (1 / message.world)).to(operands[0].dtype)


def _share(x: Tensor, message: ProbedMessage) -> Tensor:
    return torch.tensor(1 / message.world, dtype=x.dtype)


_AVERAGES: dict[str, Callable[[Sequence[Tensor], ProbedMessage], Tensor]] = {
    "sum, then divide": _sum_then_divide,
    "sum, then multiply by 1/N": _sum_then_multiply,
    "multiply by 1/N, then sum": _multiply_first,
    "sum, then multiply by 1/N before the last rounding": _multiply_wide,
}
