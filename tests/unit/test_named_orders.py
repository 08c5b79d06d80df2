"""Orders of libraries' sums: who is added to whom, read from tensors that write it down."""

from __future__ import annotations

import pytest
import torch

from tpcheck.numerics.named_orders import ORDERS, sum_in_order
from tpcheck.numerics.reduction import reduce_sum

torch.set_num_threads(1)


def swallows(order: str, size: int, element: int, count: int) -> list[list[int]]:
    """Return how many ranks' ones each pair's mask leaves: FPRev's matrix of one element.

    2^12 on rank i and its negative on rank j swallow every one that is added before they meet.
    """
    found = []
    for i in range(size):
        row = []
        for j in range(size):
            terms = torch.ones(size, count, dtype=torch.bfloat16)
            if i != j:
                terms[i], terms[j] = 2.0**12, -(2.0**12)
            row.append(int(sum_in_order(list(terms), order)[element]))
        found.append(row)
    return found


def left(tree: object, size: int) -> list[list[int]]:
    """Return the same from an order in nested pairs: how many ranks are left where two meet."""
    return [
        [size if i == j else size - len(_leaves(_meeting(tree, i, j))) for j in range(size)]
        for i in range(size)
    ]


def _leaves(tree: object) -> set[int]:
    if isinstance(tree, int):
        return {tree}
    assert isinstance(tree, tuple)
    return set().union(*map(_leaves, tree))


def _meeting(tree: object, i: int, j: int) -> object:
    assert isinstance(tree, tuple)
    below = next((one for one in tree if {i, j} <= _leaves(one)), None)
    return tree if below is None else _meeting(below, i, j)


@pytest.mark.parametrize(
    ("order", "element", "tree"),
    [
        ("rank order", 0, (((0, 1), 2), 3)),
        ("reverse rank order", 0, (((3, 2), 1), 0)),
        ("ascending ring", 0, (((1, 2), 3), 0)),
        ("ascending ring", 3, (((0, 1), 2), 3)),
        ("owner first", 0, (((0, 1), 2), 3)),
        ("owner first", 3, (((3, 0), 1), 2)),
        ("tree", 0, ((0, 1), (2, 3))),
        ("halving tree", 0, ((0, 2), (1, 3))),
        ("double tree", 0, (0, ((2, 1), 3))),
        ("double tree", 3, (3, ((1, 2), 0))),
    ],
)
def test_four_ranks_meet_where_the_order_says(order: str, element: int, tree: object) -> None:
    assert swallows(order, 4, element, 4) == left(tree, 4)


@pytest.mark.parametrize(
    ("order", "element", "tree"),
    [
        ("halving tree", 0, (((0, 4), (2, 6)), ((1, 5), (3, 7)))),
        ("double tree", 0, (0, ((4, ((2, 1), 3)), ((6, 5), 7)))),
        ("double tree", 7, (7, ((3, ((5, 6), 4)), ((1, 2), 0)))),
    ],
)
def test_eight_ranks_meet_where_the_source_says(order: str, element: int, tree: object) -> None:
    assert swallows(order, 8, element, 8) == left(tree, 8)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("count", [1, 5, 64])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_adds_every_rank_once(order: str, size: int, count: int) -> None:
    terms = list(torch.randint(-50, 50, (size, count)).double())
    assert torch.equal(sum_in_order(terms, order), torch.stack(terms).sum(0))
    assert all(torch.equal(a, b) for a, b in zip(terms, list(torch.stack(terms)), strict=True))


def test_operands_are_left_alone() -> None:
    for order in ORDERS:
        terms = torch.ones(5, 7)
        sum_in_order(list(terms), order)
        assert torch.equal(terms, torch.ones(5, 7)), order


def test_known_orders_are_those_of_the_reductions() -> None:
    terms = list(torch.randn(4, 99).bfloat16())
    for order in ("ring", "tree", "wide"):
        assert torch.equal(sum_in_order(terms, order), reduce_sum(terms, order))


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='star'"):
        sum_in_order(list(torch.ones(3, 4)), "star")
