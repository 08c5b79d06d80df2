"""Emulated reductions: what an all-reduce of a named class returns, bit for bit, in one process.

Requirement: the simulated ranks must round like real ones, and drift is judged against what a class
of reduction must cost. So every class is a pure function of the ranks' tensors, in rank order.

[Reduction Order] `ring` is Gloo's all-reduce: the tensor is cut into one chunk per rank, and chunk
c is summed down the ring, ((x[c-1] + x[c-2]) + ...) + x[c], indices mod world, each sum rounded to
the dtype on the wire. NCCL's ring ascends instead: they differ at three ranks and more.
[One Add] torch adds two 16-bit floats in float32 and rounds once, which is what Gloo does too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from tpcheck.numerics.low_precision import LOW_PRECISION, carried_as, sum_over_wire
from tpcheck.numerics.probed_reduction import ProbedReduction

KINDS = ("ring", "tree", "wide", "fp32_wire", *LOW_PRECISION)

_MAX_SEGMENT_BYTES = 1 << 20
_ROTATED_CHUNK_BYTES = 1 << 14
_ROTATED_BYTES = 1 << 25
"""Up to these sizes copying the operands once is cheaper than world^2 small adds (measured)."""

Fold = Callable[[Sequence[Tensor]], Tensor]
"""Combine operands of one shape, in order, into a new tensor."""


def reduce(
    tensors: Sequence[Tensor], op: str = "sum", kind: str | ProbedReduction = "ring"
) -> Tensor:
    """Reduce the ranks' tensors as an all-reduce of this kind would.

    `avg` is the sum divided by the world afterwards, as on Gloo; real ranks truncate whole numbers.
    `max` and `min` follow the ring whatever the kind: order matters to NaN and signed zeros only.

    Args:
        tensors: one per rank, in rank order, equal shapes and dtypes; left alone.
        op: sum, avg, max or min.
        kind: one of KINDS, or a reduction that was probed.

    Returns:
        A new contiguous tensor of the shape and dtype of the operands.

    Raises:
        ValueError: the op or kind is unknown, or such a message was not probed.

    Source: torch ProcessGroupGloo (AVG is SUM, then div_); gloo/math.h (std::max(own, received)).
        Measured: tests/real/test_gloo_bits.py.
    """
    if op == "sum":
        return reduce_sum(tensors, kind)
    if op == "avg":
        total = reduce_sum(tensors, kind)
        whole = not (total.is_floating_point() or total.is_complex())
        return total.div_(len(tensors), rounding_mode="trunc" if whole else None)
    if op not in _FOLDS:
        raise ValueError(f"reduce: op={op!r}, but should be sum, avg, max or min")
    if not isinstance(kind, ProbedReduction):
        _require_kind(kind)
    return _ring(tensors, _FOLDS[op])


def reduce_sum(tensors: Sequence[Tensor], kind: str | ProbedReduction = "ring") -> Tensor:
    """Sum the ranks' tensors as an all-reduce of this kind would.

    ring: Gloo's order and chunks, rounded to the dtype after each add. tree: balanced pairs of
    neighbours, rounded likewise; an odd one moves up. wide: one float32 accumulator (float64 for
    float32 and float64 operands) in rank order, rounded once. fp32_wire: operands cast to float32
    (float64 stays), summed by the ring, rounded once. The kinds of LOW_PRECISION quantize what they
    send, see numerics/low_precision.py; dtypes that they do not take, float64 and integers among
    them, are summed by the ring. Integers are exact, and wrap, in every kind.

    Args:
        tensors: one per rank, in rank order, equal shapes and dtypes; left alone.
        kind: one of KINDS, or a reduction that was probed.

    Returns:
        A new contiguous tensor of the shape and dtype of the operands.

    Raises:
        ValueError: the kind is unknown, or such a message was not probed.

    Source: ring: gloo/allreduce.cc, `ring`, bit-exact (measured: tests/real/test_gloo_bits.py).
        tree: recursive doubling, as Open MPI sums small messages. wide: NCCL's NVLS and
        symmetric kernels, vLLM's custom all-reduce.
    """
    if isinstance(kind, ProbedReduction):
        return kind.sum(tensors)
    kind = carried_as(kind, tensors[0].dtype)
    if kind == "ring" and len(tensors) != 2:
        return _ring(tensors, _fold_sum)
    _require_kind(kind)
    if kind in LOW_PRECISION:
        if len(tensors) > 1 and tensors[0].numel():
            return sum_over_wire(tensors, kind)
        return _ring(tensors, _fold_sum)  # nothing is sent
    if kind == "tree" or (kind == "ring" and len(tensors) == 2):  # one add has one order
        return _sum_pairs(tensors)[-1].contiguous()
    dtype = tensors[0].dtype
    if kind == "fp32_wire":
        return _ring([x.to(_fp32_wire_dtype(dtype)) for x in tensors], _fold_sum).to(dtype)
    wide = _accumulator_dtype(dtype)
    return _fold_sum([x.to(wide) for x in tensors]).to(dtype).contiguous()


def sum_nodes(tensors: Sequence[Tensor], kind: str = "ring") -> list[Tensor]:
    """Return the float64 partial sum at every node where this kind rounds to the operands' dtype.

    These are the nodes of the sigma law: expected error^2, in units of the TP=1 error, is
    (sum over ranks of |partial|^2 + sum over nodes of |partial sum|^2) / |total|^2; the ranks' own
    terms fall away for fp32_wire, whose operands are not rounded. `wide`, `fp32_wire` and the
    low-precision wires round to that dtype once, so their only node is the total; what those wires
    cost besides is `wire_error`. Ring nodes are elementwise: an element's k-th node
    follows the order of its own chunk.

    Args:
        tensors: one per rank, in rank order; their dtype decides where chunks begin.
        kind: one of KINDS.

    Returns:
        Float64 tensors of the operands' shape; the last one is the total.

    Raises:
        ValueError: the kind is unknown.

    Source: error analysis of recursive summation, Higham 2002, section 4.2, per node of the tree.
    """
    return [node for _, node in sum_steps(tensors, kind)]


def sum_steps(tensors: Sequence[Tensor], kind: str = "ring") -> list[tuple[list[Tensor], Tensor]]:
    """Return the operands and the partial sum of every node that `sum_nodes` returns."""
    _require_kind(kind)
    exact = [x.double() for x in tensors]
    if kind == "tree":
        return _pair_steps(exact) or [(exact, exact[0].clone())]
    if kind != "ring" or len(exact) == 1 or exact[0].numel() == 0:
        return [(exact, _fold_sum(exact))]
    count, shape = exact[0].numel(), exact[0].shape
    chunk = ring_chunk(count, tensors[0].element_size(), len(tensors))
    rotated = _rotated(exact, chunk)
    terms = [term.reshape(-1)[:count].reshape(shape) for term in rotated]
    sums = list(accumulate(terms))
    steps = zip(sums[:-1], terms[1:], sums[1:], strict=True)
    return [([before, term], node) for before, term, node in steps]


@lru_cache(maxsize=4096)
def ring_chunk(count: int, element_size: int, world: int) -> int:
    """Return how many elements one rank's chunk of Gloo's ring holds; trailing ones hold fewer.

    Args:
        count: elements in the tensor, at least 1.
        element_size: bytes per element.
        world: ranks, at least 2.

    Source: gloo/allreduce.cc, `ring`: segments of at most 1 MiB, a multiple of world and at least
        two per rank; segment bytes rounded up to whole elements.
    """
    size = count * element_size
    segments = _round_up(max(_ceil_div(size, _MAX_SEGMENT_BYTES), 2 * world), world)
    segment_bytes = _round_up(_ceil_div(size, segments), element_size)
    return segments // world * (segment_bytes // element_size)


def _ring(tensors: Sequence[Tensor], fold: Fold) -> Tensor:
    first, world = tensors[0], len(tensors)
    count = first.numel()
    if world == 1 or count == 0:
        return first.clone(memory_format=torch.contiguous_format)
    size = first.element_size()
    chunk = ring_chunk(count, size, world)
    if chunk * size <= _ROTATED_CHUNK_BYTES and 2 * world * count * size <= _ROTATED_BYTES:
        result = fold(_rotated(tensors, chunk)).view(-1)
        result = result if result.numel() == count else result[:count].clone()
    else:
        pieces = [x.reshape(-1).split(chunk) for x in tensors]
        result = torch.cat(
            [
                fold([pieces[(c - 1 - k) % world][c] for k in range(world)])
                for c in range(len(pieces[0]))
            ]
        )
    return result.view(first.shape)


def _rotated(tensors: Sequence[Tensor], chunk: int) -> tuple[Tensor, ...]:
    """Return the ring's operands, first to last, each [world, chunk]: row c is chunk c's.

    The k-th operand of chunk c is rank c-1-k. With every rank's elements laid out twice, rank by
    rank, that is one strided view per k: one copy and world-1 adds instead of world^2 slices.
    Reading past a rank's last element lands in the next rank's; nobody looks at those sums.
    """
    world, count = len(tensors), tensors[0].numel()
    pad = world * chunk - count
    both = torch.stack([*tensors, *tensors[:-1]]).reshape(-1)
    if pad:
        both = torch.cat([both, both.new_zeros(pad)])
    steps = both.as_strided((world, world, chunk), (count, count + chunk, 1))
    return steps.unbind(0)[::-1]


def _fold_sum(operands: Sequence[Tensor]) -> Tensor:
    if len(operands) == 1:
        return operands[0].clone()
    total = operands[0] + operands[1]
    for operand in operands[2:]:
        total += operand
    return total


def _fold_max(operands: Sequence[Tensor]) -> Tensor:
    best = operands[0]
    for own in operands[1:]:
        best = torch.where(own < best, best, own)
    return best


def _fold_min(operands: Sequence[Tensor]) -> Tensor:
    best = operands[0]
    for own in operands[1:]:
        best = torch.where(best < own, best, own)
    return best


_FOLDS: dict[str, Fold] = {"max": _fold_max, "min": _fold_min}


def _sum_pairs(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return every sum of a balanced tree over the tensors, the total last."""
    return [node for _, node in _pair_steps(tensors)] or [tensors[0].clone()]


def _pair_steps(tensors: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    steps: list[tuple[list[Tensor], Tensor]] = []
    level = list(tensors)
    while len(level) > 1:
        pairs = [[a, b] for a, b in zip(level[::2], level[1::2], strict=False)]
        sums = [a + b for a, b in pairs]
        steps += zip(pairs, sums, strict=True)
        level = sums + level[2 * len(sums) :]
    return steps


def _accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        return dtype
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _fp32_wire_dtype(dtype: torch.dtype) -> torch.dtype:
    keeps = not dtype.is_floating_point or dtype == torch.float64
    return dtype if keeps else torch.float32


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"reduction kind={kind!r}, but should be one of {', '.join(KINDS)}")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b
