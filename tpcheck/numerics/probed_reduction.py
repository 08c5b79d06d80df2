"""A reduction as it was probed: every chunk's tree of additions and its accumulator, replayed.

Requirement: what a probe read has to be more than a description: summing the same operands by it
gives the bits of the machine it was read from, so simulated ranks can round like that machine.

[Probed Messages] An all-reduce picks its order by size, dtype and world. A message that was not
probed has no order here; it is refused, and not summed by a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcheck.numerics.order import Chunk, Tree

ANY = "any"
"""The accumulator where each gives the same bits: two ranks, one addition."""


@dataclass(frozen=True, slots=True)
class ProbedMessage:
    """How `world` ranks sum `count` elements of `dtype` that travel as `wire`."""

    world: int
    dtype: str
    count: int
    wire: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class ProbedReduction:
    """The messages that were probed. Simulated ranks take one as their reduction."""

    messages: tuple[ProbedMessage, ...]

    def sum(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum the ranks' tensors as the probed all-reduce does.

        Integers are exact in any order. A single rank's tensor is its own sum.

        Args:
            tensors: one per rank, in rank order, equal shapes and dtypes; left alone.

        Returns:
            A new contiguous tensor of the shape and dtype of the operands.

        Raises:
            ValueError: no message of this world, dtype and size was probed.

        Source: read by numerics/order.py; bit-exact on Gloo (measured: tests/real/
            test_probe_gloo.py).
        """
        first = tensors[0]
        if len(tensors) == 1 or first.numel() == 0:
            return first.clone(memory_format=torch.contiguous_format)
        if not first.dtype.is_floating_point:
            return torch.stack(list(tensors)).sum(0, dtype=first.dtype)
        dtype = str(first.dtype).removeprefix("torch.")
        asked = (len(tensors), dtype, first.numel())
        for one in self.messages:
            if (one.world, one.dtype, one.count) == asked:
                return sum_message([x.reshape(-1) for x in tensors], one).view(first.shape)
        raise ValueError(
            f"probed reduction: {asked[2]} elements of {dtype} at {asked[0]} ranks were not probed;"
            f" probed there: {self._probed(asked[0], dtype) or 'nothing'}"
        )

    def _probed(self, world: int, dtype: str) -> str:
        counts = [one.count for one in self.messages if (one.world, one.dtype) == (world, dtype)]
        return ", ".join(map(str, counts))


def sum_message(flat: Sequence[Tensor], message: ProbedMessage) -> Tensor:
    """Sum flat operands chunk by chunk. See `ProbedReduction.sum`.

    Source: as there.
    """
    wire = getattr(torch, message.wire)
    sums = [
        sum_by_tree([x[chunk.start : chunk.stop] for x in flat], chunk.tree, wire, _rounded(chunk))
        for chunk in message.chunks
    ]
    return torch.cat(sums)


def sum_by_tree(
    operands: Sequence[Tensor],
    tree: Tree | None,
    wire: torch.dtype,
    accumulator: torch.dtype | None = None,
) -> Tensor:
    """Sum operands in the order of a tree, each sum rounded to the accumulator's dtype.

    Args:
        operands: one per rank, equal shapes and dtypes.
        tree: None for an order that is invisible, where the accumulator is exact.
        wire: what operands are cast to first; their own dtype where nothing is lost on the way.
        accumulator: None for the wire's dtype, which is a rounding per hop.

    Source: torch adds 16-bit floats in float32 and rounds once, which equals one rounding of the
        exact sum; a node of several children is summed in float64 and rounded once.
    """
    dtype = operands[0].dtype
    arriving = [x.to(wire).to(accumulator or wire) for x in operands]
    if tree is None:
        return torch.stack(arriving).double().sum(0).to(dtype)
    return _fold(arriving, tree).to(dtype)


def _fold(operands: Sequence[Tensor], tree: Tree) -> Tensor:
    if isinstance(tree, int):
        return operands[tree]
    children = [_fold(operands, child) for child in tree]
    if len(children) == 2:
        return children[0] + children[1]
    return torch.stack(children).double().sum(0).to(operands[0].dtype)


def _rounded(chunk: Chunk) -> torch.dtype | None:
    if chunk.accumulator in (None, ANY):
        return None
    dtype: torch.dtype = getattr(torch, str(chunk.accumulator))
    return dtype
