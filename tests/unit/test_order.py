"""Reading an order of additions: every tree that sums is read back exactly, and nothing else is.

The reductions here are emulated from a tree that Hypothesis draws, so the right answer is known;
tests/real/test_probe_gloo.py reads real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.orders import accumulators_of, trees
from tpcheck.numerics.order import (
    MOST_CHUNKS,
    Chunk,
    Tree,
    Unreadable,
    in_order,
    leaves_of,
    leaves_under,
    mask_of,
    pairs_of,
    pairs_under,
    read_chunks,
    tree_of,
)
from tpcheck.numerics.probed_reduction import sum_by_tree
from tpcheck.numerics.reduction import reduce_sum, ring_chunk

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RING_OF_4 = (((2, 3), 1), 0)

Sum = Callable[[list[Tensor]], Tensor]


def read(sums: Sum, world: int, dtype: torch.dtype, count: int = 1) -> tuple[Chunk, ...]:
    mask = mask_of(dtype, dtype, world)
    outputs = [
        sums([torch.full((count,), mask.value(rank, pair), dtype=dtype) for rank in range(world)])
        for pair in pairs_of(world)
    ]
    return read_chunks(torch.stack([leaves_under(one, mask, world) for one in outputs]), world)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(data=st.data())
def test_every_tree_is_read_back_exactly_from_its_sums(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    tree = data.draw(trees())
    accumulator = data.draw(st.sampled_from(accumulators_of(dtype)))
    world = len(leaves_of(tree))
    (chunk,) = read(lambda xs: sum_by_tree(xs, tree, dtype, accumulator), world, dtype)
    assert chunk == Chunk(0, 1, tree)


@given(trees(most=10, widest=4))
def test_a_node_that_adds_several_at_once_is_read_as_one(tree: Tree) -> None:
    assert tree_of(pairs_under(tree), len(leaves_of(tree))) == tree


@given(trees(fewest=3), st.data())
def test_another_tree_leaves_other_counts(tree: Tree, data: st.DataObject) -> None:
    world = len(leaves_of(tree))
    other = data.draw(trees(fewest=world, most=world))
    assert (pairs_under(tree) == pairs_under(other)) == (tree == other)


@pytest.mark.parametrize("accumulator", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("world", [9, 10, 18, 19, 40])
def test_many_ranks_of_float16_are_swamped_on_either_side(
    world: int, accumulator: torch.dtype
) -> None:
    half = world // 2
    tree: Tree = in_order([_chain(range(half)), _chain(range(half, world))])
    for each in (tree, _chain(range(world)), _chain(range(world - 1, -1, -1))):
        (chunk,) = read(
            lambda xs, each=each: sum_by_tree(xs, each, torch.float16, accumulator),  # type: ignore[misc]
            world,
            torch.float16,
        )
        assert chunk.tree == each


def _chain(ranks: range) -> Tree:
    tree: Tree = ranks[0]
    for rank in ranks[1:]:
        tree = in_order([tree, rank])
    return tree


def test_an_exact_accumulator_shows_no_order() -> None:
    (chunk,) = read(lambda xs: sum_by_tree(xs, None, torch.float16), 4, torch.float16)
    assert chunk == Chunk(0, 1, None)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 1003])
def test_the_ring_is_read_as_a_chunk_per_rank(count: int) -> None:
    chunks = read(reduce_sum, 4, torch.bfloat16, count)
    size = ring_chunk(count, 2, 4)
    edges = [(start, min(start + size, count)) for start in range(0, count, size)]
    assert [(one.start, one.stop) for one in chunks] == edges
    assert chunks[0].tree == RING_OF_4
    assert len({one.tree for one in chunks}) == len(chunks)


@pytest.mark.parametrize(
    ("kind", "tree"),
    [("tree", ((0, 1), (2, 3))), ("wide", (((0, 1), 2), 3))],
)
def test_known_kinds_are_read_as_what_they_are(kind: str, tree: Tree) -> None:
    assert read(lambda xs: reduce_sum(xs, kind), 4, torch.float32, 7) == (Chunk(0, 7, tree),)


def test_what_is_no_count_of_leaves_is_refused_with_its_element() -> None:
    mask = mask_of(torch.float32, torch.float32, 4)
    for value in (0.5, 3.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Unreadable, match=r"element 1: a masked sum of .*, but should be"):
            leaves_under(torch.tensor([1.0, value]), mask, 4)


def test_counts_that_contradict_one_another_are_no_tree() -> None:
    under = pairs_under(RING_OF_4)
    for pair in combinations(range(4), 2):
        for count in {2, 3, 4} - {under[pair]}:
            changed = {**under, pair: count}
            try:
                assert pairs_under(tree_of(changed, 4)) == changed  # one pair may make another tree
            except Unreadable:
                continue
    with pytest.raises(Unreadable, match="element 0: no tree of 4 ranks"):
        read_chunks(torch.tensor([[2], [2], [2], [2], [2], [3]]), 4)


def test_a_message_without_chunks_is_refused() -> None:
    count = 2 * MOST_CHUNKS + 2
    under = torch.tensor([[2, 3], [3, 2], [3, 3]]).repeat(1, count // 2)
    with pytest.raises(Unreadable, match=f"changes {count - 1} times in {count} elements"):
        read_chunks(under, 3)
