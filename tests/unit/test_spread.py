"""Percentiles, ulp histograms and bootstrap intervals, against definitions and known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.numerics.spread import (
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


def test_95_percent_intervals_hold_the_true_ratio_about_95_times_in_100() -> None:
    draw = torch.Generator().manual_seed(0)
    held = 0
    for seed in range(200):
        expected, actual = torch.randn((2, 150), generator=draw, dtype=torch.float64).square()
        found = ratio_interval(actual * 4, expected, seed=seed)
        assert found is not None
        held += found.low <= 2.0 <= found.high
    # 190 of 200 are expected; the percentile bootstrap of a few hundred is a little short
    assert 178 <= held <= 200


def test_more_tokens_than_blocks_are_pooled_into_neighbours() -> None:
    draw = torch.Generator().manual_seed(0)
    expected, actual = torch.randn((2, 20_000), generator=draw, dtype=torch.float64).square()
    found = ratio_interval(actual, expected)
    assert found is not None
    assert found.low < 1.0 < found.high
    # one standard error of a ratio of rms of 20,000 normal errors each: 1 / sqrt(20,000)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(20_000), rel=0.25)


def test_a_floor_bounds_what_the_errors_are_held_against() -> None:
    ones, zeros = torch.ones(50), torch.zeros(50)
    found = ratio_interval(ones, zeros, floor=0.25)
    assert found is not None
    assert (found.low, found.high) == (2.0, 2.0)


def test_few_tokens_have_no_interval_and_one_case_has_none() -> None:
    assert ratio_interval(torch.ones(7), torch.ones(7)) is None
    assert mean_ratio_interval([1.0], [1.0]) is None


def test_cases_that_agree_leave_no_doubt_and_others_do() -> None:
    same = mean_ratio_interval([4.0] * 5, [1.0] * 5)
    assert same is not None
    assert (same.low, same.high) == (2.0, 2.0)
    apart = mean_ratio_interval([1.0, 4.0, 9.0, 4.0], [1.0] * 4)
    assert apart is not None
    assert 1.0 < apart.low < math.sqrt(4.5) < apart.high < 3.0
