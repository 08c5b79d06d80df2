"""How a reduction rounds: planted wires, accumulators and averages are named, and no others.

Every reduction here is an emulation whose rounding is known, seen through the inputs that a probe
would send, in messages from one element up.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.orders import accumulators_of, trees
from tpcheck.numerics.order import Chunk, Tree, leaves_of
from tpcheck.numerics.probed_reduction import ANY, ProbedMessage, sum_by_tree
from tpcheck.numerics.rounding_probe import (
    accumulator_table,
    average_operands,
    candidates,
    laid_out,
    read_accumulators,
    read_average,
    read_wire,
    rounds_needed,
    wire_table,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHAIN = (((2, 3), 1), 0)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def messages(table: Tensor, dtype: torch.dtype, count: int, world: int) -> list[list[Tensor]]:
    share = max(1, count // world)
    return [
        [laid_out(table[:, rank], count, share, turn).to(dtype) for rank in range(world)]
        for turn in range(rounds_needed(len(table), share))
    ]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@settings(max_examples=30)
@given(data=st.data())
def test_the_accumulator_is_named_and_no_other(dtype: torch.dtype, data: st.DataObject) -> None:
    tree: Tree = data.draw(trees(fewest=3))
    world, count = len(leaves_of(tree)), data.draw(st.sampled_from([1, 7, 100]))
    for accumulator in accumulators_of(dtype):
        seen = [
            (xs, sum_by_tree(xs, tree, dtype, accumulator))
            for xs in messages(accumulator_table(dtype, world), dtype, count, world)
        ]
        (chunk,) = read_accumulators([Chunk(0, count, tree)], dtype, seen)
        assert chunk.accumulator == named(accumulator)


def test_every_accumulator_gives_the_same_bits_at_two_ranks() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        table = accumulator_table(dtype, 2)
        seen = [(xs, sum_by_tree(xs, (0, 1), dtype)) for xs in messages(table, dtype, 9, 2)]
        (chunk,) = read_accumulators([Chunk(0, 9, (0, 1))], dtype, seen)
        assert chunk.accumulator == ANY


def test_a_rounding_that_nothing_explains_is_not_named() -> None:
    table = accumulator_table(torch.bfloat16, 4)
    seen = [
        (xs, sum_by_tree(xs, CHAIN, torch.bfloat16).nextafter(torch.tensor(9.0).bfloat16()))
        for xs in messages(table, torch.bfloat16, 40, 4)
    ]
    (chunk,) = read_accumulators([Chunk(0, 40, CHAIN)], torch.bfloat16, seen)
    assert chunk.accumulator is None


def test_chunks_may_round_differently() -> None:
    table = accumulator_table(torch.bfloat16, 4)
    chunks = [Chunk(0, 20, CHAIN), Chunk(20, 40, CHAIN)]
    seen = []
    for xs in messages(table, torch.bfloat16, 40, 4):
        hops = sum_by_tree(xs, CHAIN, torch.bfloat16)
        wide = sum_by_tree(xs, CHAIN, torch.bfloat16, torch.float32)
        seen.append((xs, torch.cat([hops[:20], wide[20:]])))
    read = read_accumulators(chunks, torch.bfloat16, seen)
    assert [one.accumulator for one in read] == ["bfloat16", "float32"]


@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_narrower_wire_is_named_and_a_wide_one_is_the_tensors_own(
    dtype: torch.dtype, count: int
) -> None:
    for wire in FLOATS:
        seen = [
            read_wire(xs, sum_by_tree([x.to(wire).to(dtype) for x in xs], CHAIN, dtype))
            for xs in messages(wire_table(dtype, 4), dtype, count, 4)
        ]
        found = [one for one in seen[0] if all(one in each for each in seen)]
        keeps = torch.finfo(wire).eps <= torch.finfo(dtype).eps
        keeps &= torch.finfo(wire).max >= torch.finfo(dtype).max
        assert found == [dtype if keeps else wire]


def test_an_eight_bit_wire_is_none_of_them() -> None:
    for xs in messages(wire_table(torch.bfloat16, 4), torch.bfloat16, 100, 4):
        coarse = [x.float().clamp(-448, 448).to(torch.float8_e4m3fn).bfloat16() for x in xs]
        assert read_wire(xs, sum_by_tree(coarse, CHAIN, torch.bfloat16)) == ()


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("name", ["sum, then divide", "multiply by 1/N, then sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_average_is_told_by_what_it_does_first(
    dtype: torch.dtype, name: str, world: int
) -> None:
    tree = CHAIN if world == 4 else ((1, 2), 0)
    message = ProbedMessage(world, named(dtype), 500, named(dtype), (Chunk(0, 500, tree, ANY),))
    generator = torch.Generator().manual_seed(1)
    random = {
        rank: torch.randn(500, generator=generator, dtype=torch.float64).to(dtype)
        for rank in range(world)
    }
    seen = []
    for operands in (random, average_operands(random)):
        xs = list(operands.values())
        share = torch.tensor(1 / world, dtype=dtype)
        first = sum_by_tree([x * share for x in xs], tree, dtype)
        last = sum_by_tree(xs, tree, dtype) / world
        seen.append((xs, last if name.startswith("sum") else first))
    found = read_average(message, seen)
    assert found[0] == name
    assert all(one.startswith(name.split()[0]) for one in found)
    assert read_average(message, [(xs, output + 1) for xs, output in seen[:1]]) == ()


def test_the_candidates_are_the_wire_and_what_is_wider() -> None:
    assert candidates(torch.bfloat16) == (torch.bfloat16, torch.float32, torch.float64)
    assert candidates(torch.float64) == (torch.float64,)
