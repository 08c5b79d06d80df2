"""Orders in which libraries add up what the ranks sent, each rounded to the wire after every add.

Requirement: a reduction can be named only if it was tried, so what real libraries do beyond the
kinds of numerics/reduction.py is written down here, with where it was read. Each is a pure function
of the ranks' tensors, in rank order.

[Never Run Here] NCCL's orders are those of one channel and one round of chunks, where a rank is a
node; larger messages repeat them in pieces that only a probe of that size can know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tpcheck.numerics.reduction import reduce_sum

ORDERS = (
    "ring",
    "ascending ring",
    "owner first",
    "rank order",
    "reverse rank order",
    "tree",
    "halving tree",
    "double tree",
    "wide",
)
"""What `sum_in_order` knows; `wide` rounds once, whatever the order."""


def sum_in_order(terms: Sequence[Tensor], order: str) -> Tensor:
    """Return the sum of the ranks' flat tensors [N] in a named order.

    ring, tree, wide: as numerics/reduction.py. ascending ring: NCCL's, chunk c begins at rank c + 1
    and ends at rank c. owner first: chunk c begins at rank c, as two-shot kernels do where each
    rank adds the others' pieces to its own. rank order: 0, 1, 2, ..., a loop over gathered terms,
    or one rank that receives in turn. reverse rank order: the last rank first, as along a chain
    that ends at rank 0. halving tree: ranks half the world apart first, then a quarter, and so on,
    as a recursive halving does. double tree: the first half of the elements along NCCL's binary
    tree, the second half along its mirror.

    Raises:
        ValueError: the order is unknown.

    Source: ascending ring, chain, double tree: read in NCCL 2.28.9 (src/device/all_reduce.h,
        src/graph/trees.cc), never run here. owner first, rank order: vLLM's custom all-reduce, two
        stages and one, which rounds once (`wide`); with low-precision adds they are these. halving
        tree: Rabenseifner's algorithm, Thakur et al. 2005.
    """
    if order in _CHUNKED:
        return _chunked(terms, _CHUNKED[order])
    if order in _WHOLE:
        return _WHOLE[order](terms)
    return reduce_sum(terms, order)


def _fold(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total = total + term
    return total


def _chunked(terms: Sequence[Tensor], first: Callable[[int], int]) -> Tensor:
    """Add chunk c from rank `first(c)` upwards."""
    size, count = len(terms), terms[0].numel()
    chunk = -(-count // size)
    total = torch.empty_like(terms[0])
    for c in range(size):
        part = slice(c * chunk, (c + 1) * chunk)
        total[part] = _fold([terms[(first(c) + hop) % size][part] for hop in range(size)])
    return total


def _halving(terms: Sequence[Tensor]) -> Tensor:
    """Add pairs half the ranks apart until one is left; an odd one in the middle waits a round."""
    level = list(terms)
    while len(level) > 1:
        half = (len(level) + 1) // 2
        pairs = zip(level[:half], level[half:], strict=False)
        level = [a + b for a, b in pairs] + level[len(level) - half : half]
    return level[0].clone()


def _double_tree(terms: Sequence[Tensor]) -> Tensor:
    half = -(-terms[0].numel() // 2)
    size = len(terms)
    first = [term[:half] for term in terms]
    mirror = list(reversed(range(size))) if size % 2 == 0 else [(r + 1) % size for r in range(size)]
    second = [terms[rank][half:] for rank in mirror]
    return torch.cat([_down(first, 0), _down(second, 0)])


def _down(terms: Sequence[Tensor], node: int) -> Tensor:
    """Return what a node of the binary tree sends up: its own term, then its children's sums."""
    total = terms[node].clone()
    for child in _children(node, len(terms)):
        total = total + _down(terms, child)
    return total


def _children(node: int, size: int) -> list[int]:
    """Return a node's children: `node` less and more than it by half of its lowest set bit.

    Rank 0 has the largest power of two below the size as its only child; a child beyond the last
    rank is replaced by the nearest one that its own half would reach.
    """
    if node == 0:
        return [1 << ((size - 1).bit_length() - 1)] if size > 1 else []
    step = (node & -node) >> 1
    if not step:
        return []
    found = [node - step]
    while step and node + step >= size:
        step >>= 1
    return [*found, node + step] if step else found


_CHUNKED: dict[str, Callable[[int], int]] = {
    "ascending ring": lambda chunk: chunk + 1,
    "owner first": lambda chunk: chunk,
}
_WHOLE: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "rank order": _fold,
    "reverse rank order": lambda terms: _fold(list(reversed(terms))),
    "halving tree": _halving,
    "double tree": _double_tree,
}
