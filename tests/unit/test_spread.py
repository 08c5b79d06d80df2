"""Percentiles, ulp histograms and intervals, against definitions and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.numerics.spread import (
    _student_t,
    mean_ratio_interval,
    percentiles,
    ratio_interval,
    ulp_histogram,
)
from tpcheck.numerics.ulp import in_ulp


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.sampled_from([1.0, 50.0, 90.0, 99.9, 100.0]),
)
def test_a_percentile_is_the_smallest_value_that_so_many_are_not_above(
    values: list[float], share: float
) -> None:
    (found,) = percentiles(torch.tensor(values, dtype=torch.float64), [share])
    needed = share / 100 * len(values) - 1e-6
    assert found in values
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < needed + 1e-5 or share == 100.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_histogram_puts_every_error_into_the_bin_of_its_ulp(dtype: str) -> None:
    named = getattr(torch, dtype)
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(300, generator=draw).to(named).double() * 8
    errors = values * torch.randn(300, generator=draw).double() * torch.finfo(named).eps * 4
    errors[:9] = 0.0
    found = dict(ulp_histogram(errors, values, named))
    expected: dict[int, int] = {}
    for error, value in zip(errors.tolist(), values.tolist(), strict=True):
        steps = in_ulp(abs(error), value, named)
        top = 0 if steps == 0 else 2 ** max(0, math.ceil(math.log2(steps)))
        expected[top] = expected.get(top, 0) + 1
    assert {top: count for top, count in found.items() if count} == expected
    assert found[0] == 9


def test_no_errors_are_no_bins() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert ulp_histogram(empty, empty, torch.bfloat16) == []


def held(blocks: int, *, tokens: int = 16, shared: float = 0.0, draws: int = 400) -> float:
    """Return how often the interval holds the true ratio, of blocks whose tokens go together.

    Errors at TP=N are TP=1's and as much again; `shared` is the spread of how large a block's are.
    """
    draw = torch.Generator().manual_seed(blocks)
    hits = 0
    for _ in range(draws):
        size = torch.randn((blocks, 1), generator=draw, dtype=torch.float64).mul(shared).exp()
        at_1, more = torch.randn((2, blocks, tokens), generator=draw, dtype=torch.float64) * size
        found = ratio_interval((at_1 + more).square().sum(1), at_1.square().sum(1))
        assert found is not None
        hits += found.low <= math.sqrt(2) <= found.high
    return hits / draws


@pytest.mark.parametrize("blocks", [2, 3, 4, 8, 32, 200])
@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_95_percent_intervals_hold_the_true_ratio_of_few_blocks_too(
    blocks: int, shared: float
) -> None:
    # two standard errors of 400 draws at 95 % are 2.2 %; blocks of another size cost 2 % more
    assert held(blocks, shared=shared) >= 0.95 - 0.022 - 0.02 * (shared > 0)


def test_intervals_are_no_wider_than_the_normal_ones_where_blocks_are_many() -> None:
    draw = torch.Generator().manual_seed(0)
    expected, actual = torch.randn((2, 20_000), generator=draw, dtype=torch.float64).square()
    found = ratio_interval(actual, expected)
    assert found is not None
    assert found.low < 1.0 < found.high
    # one standard error of a ratio of rms of 20,000 normal errors each: 1 / sqrt(20,000)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.05)


def test_a_least_bounds_what_the_errors_are_held_against() -> None:
    found = ratio_interval(torch.ones(50), torch.zeros(50), least_B=torch.full((50,), 0.25))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_where_nothing_tells_the_spread_there_is_no_interval() -> None:
    ones, zeros = torch.ones(4), torch.zeros(4)
    alone = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert ratio_interval(ones[:1], ones[:1]) is None
    assert mean_ratio_interval([1.0], [1.0]) is None
    assert ratio_interval(alone, ones) is None  # one block holds it all
    assert ratio_interval(ones, alone) is None
    assert ratio_interval(ones, zeros) is None
    assert ratio_interval(zeros, zeros) is None
    none = ratio_interval(zeros, ones)
    assert none is not None
    assert (none.low, none.high) == (0.0, 0.0)


def test_cases_that_agree_leave_no_doubt_and_others_do() -> None:
    same = mean_ratio_interval([4.0] * 5, [1.0] * 5)
    assert same is not None
    assert (same.low, same.high) == pytest.approx((2.0, 2.0))
    apart = mean_ratio_interval([1.0, 4.0, 9.0, 4.0], [1.0] * 4)
    assert apart is not None
    assert 0.5 < apart.low < math.sqrt(4.5) < apart.high < 5.0


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (30, 2.042)]
)
def test_students_t_is_that_of_the_tables(degrees: int, quantile: float) -> None:
    assert _student_t(degrees) == pytest.approx(quantile, rel=2e-3)
