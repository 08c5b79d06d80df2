"""Read in which order an all-reduce adds its ranks, from its outputs alone.

Requirement: "differences are normal" is no answer when two machines disagree. The order of the
additions can be read exactly: put M on rank i, -M on rank j and a small leaf everywhere else. M
swamps every leaf that it meets before the two Ms cancel, so what is left in the sum are the leaves
outside the smallest subtree that holds both i and j. All pairs together give every element's tree.

[Swamping] M is the largest power of two of the narrowest dtype on the way, so that an accumulator
in float64 loses the leaf too. float16 ends at 2^15, where a leaf of 1 would not do: -2^15 keeps a
sum of nine of them, and a float32 accumulator keeps every one. 2^-14 is lost in float32 too while
at most 16 leaves are on one side; above 18 ranks the smallest subnormal takes its place.
[Invisible] An accumulator that keeps M and leaf together returns the other ranks' leaves of every
pair. It adds such operands exactly, so that no order can be seen.
[Fused] An instruction may add more than two operands at once, and then loses all their leaves
together: a node with more than two children.

Source: masked summation, the idea of FPRev (Xie et al., USENIX ATC 2025). Counts of leaves are
exact: below 256 in bfloat16, 2048 in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

Tree = int | tuple["Tree", ...]
"""A rank, or the sum of its children: ((1, 2), 3) adds ranks 1 and 2, then 3."""

Pair = tuple[int, int]

MOST_CHUNKS = 4096
"""A message whose order changes more often than this is not summed in chunks."""

_FLOAT16_RANKS = 18


class Unreadable(Exception):
    """The outputs fit no tree of additions; the message says where, and what was read."""


@dataclass(frozen=True, slots=True)
class Mask:
    """What swamps, and the leaf that is swamped."""

    swamp: float
    leaf: float

    def value(self, rank: int, pair: Pair) -> float:
        """Return what a rank puts in when this pair is masked."""
        if rank not in pair:
            return self.leaf
        return self.swamp if rank == pair[0] else -self.swamp


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements from `start` up to `stop`, all summed in one order.

    `tree` is None where the order is invisible. `accumulator` is the dtype that every sum is
    rounded to, "any" where each gives the same bits, None where it is not known.
    """

    start: int
    stop: int
    tree: Tree | None
    accumulator: str | None = None


def mask_of(dtype: torch.dtype, wire: torch.dtype, world: int) -> Mask:
    """Return the mask for tensors of `dtype` that travel as `wire`.

    Source: [Swamping].
    """
    largest = min(torch.finfo(dtype).max, torch.finfo(wire).max)
    swamp = 2.0 ** (math.frexp(largest)[1] - 1)
    if swamp > 2.0**15:
        return Mask(swamp, 1.0)
    return Mask(swamp, 2.0**-14 if world <= _FLOAT16_RANKS else 2.0**-24)


def pairs_of(world: int) -> list[Pair]:
    """Return the pairs of ranks to mask, each once."""
    return list(combinations(range(world), 2))


def leaves_under(output: Tensor, mask: Mask, world: int) -> Tensor:
    """Return how many leaves the smallest subtree with a masked pair has, for every element.

    Args:
        output: what the all-reduce returned for the pair, flat.

    Returns:
        int16, [elements], on the CPU.

    Raises:
        Unreadable: an output is no count of leaves.

    Source: the masked sum is (world - leaves under the pair's lowest common ancestor) * leaf.
    """
    under = world - output.double().cpu() / mask.leaf
    wrong = ~((under >= 2) & (under <= world) & (under == under.round()))
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise Unreadable(
            f"element {where}: a masked sum of {float(output[where]):g}, but should be 0 to"
            f" {world - 2} leaves of {mask.leaf:g}"
        )
    return under.to(torch.int16)


def read_chunks(under: Tensor, world: int) -> tuple[Chunk, ...]:
    """Return the message's chunks, each with the tree that all its elements are summed by.

    Args:
        under: [pairs, elements], `leaves_under` of every pair of `pairs_of`, in that order.
        world: ranks, at least 2.

    Raises:
        Unreadable: an element's counts belong to no tree, or the order changes all the time.

    Source: module docstring.
    """
    changes = (under[:, 1:] != under[:, :-1]).any(0).nonzero().flatten() + 1
    if len(changes) >= MOST_CHUNKS:
        raise Unreadable(f"the order changes {len(changes)} times in {under.shape[1]} elements")
    starts = [0, *changes.tolist()]
    pairs = pairs_of(world)
    trees: dict[tuple[int, ...], Tree | None] = {}
    chunks = []
    for start, stop in zip(starts, [*starts[1:], under.shape[1]], strict=True):
        counts = tuple(under[:, start].tolist())
        if counts not in trees:
            trees[counts] = _tree_at(dict(zip(pairs, counts, strict=True)), world, start)
        chunks.append(Chunk(start, stop, trees[counts]))
    return tuple(chunks)


def tree_of(under: Mapping[Pair, int], world: int) -> Tree:
    """Return the tree in which every pair's lowest common ancestor has so many leaves.

    Children stand in a fixed order, larger subtree first, then lower rank: addition commutes.

    Raises:
        Unreadable: there is no such tree.

    Source: the children of a node are what remains connected when the pairs that meet in it are
        taken apart.
    """
    tree = _subtree(under, list(range(world)))
    if pairs_under(tree) != dict(under):
        raise Unreadable("the pairs' counts contradict one another")
    return tree


def pairs_under(tree: Tree) -> dict[Pair, int]:
    """Return how many leaves the lowest common ancestor of every pair has: `tree_of`, backwards."""
    found: dict[Pair, int] = {}
    _collect(tree, found)
    return found


def in_order(children: Sequence[Tree]) -> tuple[Tree, ...]:
    """Return the children of a node as every tree here has them: larger first, then by rank."""
    return tuple(sorted(children, key=lambda child: (-len(leaves_of(child)), leaves_of(child))))


def leaves_of(tree: Tree) -> list[int]:
    """Return the ranks in a tree, ascending."""
    if isinstance(tree, int):
        return [tree]
    return sorted(rank for child in tree for rank in leaves_of(child))


def _tree_at(under: Mapping[Pair, int], world: int, element: int) -> Tree | None:
    if world > 2 and set(under.values()) == {2}:
        return None  # [Invisible]
    try:
        return tree_of(under, world)
    except Unreadable as error:
        raise Unreadable(f"element {element}: no tree of {world} ranks: {error}") from None


def _subtree(under: Mapping[Pair, int], ranks: list[int]) -> Tree:
    if len(ranks) == 1:
        return ranks[0]
    groups = _connected(under, ranks)
    if len(groups) == 1:
        raise Unreadable(f"ranks {ranks} meet nowhere")
    return in_order([_subtree(under, group) for group in groups])


def _connected(under: Mapping[Pair, int], ranks: list[int]) -> list[list[int]]:
    """Group ranks that are joined by pairs which meet below the node of all these ranks."""
    groups: list[list[int]] = []
    for rank in ranks:
        joined = [
            group
            for group in groups
            if any(under[min(rank, one), max(rank, one)] < len(ranks) for one in group)
        ]
        kept = [group for group in groups if group not in joined]
        groups = [*kept, sorted([rank, *(one for group in joined for one in group)])]
    return groups


def _collect(tree: Tree, found: dict[Pair, int]) -> list[int]:
    if isinstance(tree, int):
        return [tree]
    sides = [_collect(child, found) for child in tree]
    size = sum(map(len, sides))
    for first, second in combinations(sides, 2):
        for one in first:
            for other in second:
                found[min(one, other), max(one, other)] = size
    return [rank for side in sides for rank in side]
