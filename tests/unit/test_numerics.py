"""Ulp, the drift law against what was measured, and tolerances with their sources."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.errors import TPCheckError
from tpcheck.numerics.drift import (
    ERROR_FLOOR,
    RATIO_FLOOR,
    effective_count,
    expected_ratio,
    floored,
    ratio_limit,
    sampling_spread,
)
from tpcheck.numerics.reduction import reduce_sum
from tpcheck.numerics.tolerance import (
    NOISE_FACTOR,
    STRUCTURAL_LIMIT,
    Tolerance,
    derived_tolerance,
    structural_limit,
    users_tolerance,
)
from tpcheck.numerics.ulp import eps, in_ulp, ulp

torch.set_num_threads(1)
DTYPES = ("bfloat16", "float16", "float32", "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_is_the_step_above_one(dtype):
    assert eps(dtype) == eps(getattr(torch, dtype)) == torch.finfo(getattr(torch, dtype)).eps
    assert ulp(1.0, dtype) == eps(dtype)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (16.0, "bfloat16", 0.125),
        (-16.0, "bfloat16", 0.125),
        (15.9, "bfloat16", 0.0625),
        (0.0, "float16", 2.0**-24),
        (65504.0, "float16", 32.0),
        (math.inf, "float32", math.inf),
        (3.0, "int64", 1.0),
    ],
)
def test_ulp_is_the_spacing_of_the_dtypes_numbers(value, dtype, expected):
    assert ulp(value, dtype) == expected


@given(st.floats(2.0**-100, 2.0**100))
def test_the_next_number_is_one_ulp_away(value):
    x = torch.tensor(value, dtype=torch.float32)
    step = torch.nextafter(x, torch.tensor(math.inf)) - x
    assert float(step) == ulp(float(x), "float32")
    assert in_ulp(3 * float(step), float(x), "float32") == 3


# NUMERICS, section 2: measured with K=4096, N=1024, B=64.
MEASURED = [
    (2, 1.47, 1.47, 1.47, 1.00),
    (4, 1.91, 1.83, 1.42, 1.00),
    (8, 2.44, 2.13, 1.42, 1.00),
    (16, 3.20, 2.39, 1.41, 1.00),
]


@pytest.mark.parametrize(
    ("tp_size", "kind", "measured"),
    [
        (row[0], kind, ratio)
        for row in MEASURED
        for kind, ratio in zip(("ring", "tree", "wide", "fp32_wire"), row[1:], strict=True)
    ],
)
def test_the_law_is_at_most_seven_percent_below_what_was_measured(tp_size, kind, measured):
    assert 1 / 1.075 <= expected_ratio(tp_size, kind) / measured <= 1.005


@pytest.mark.parametrize("kind", ["ring", "tree", "wide", "fp32_wire"])
@pytest.mark.parametrize("tp_size", [4, 8])
def test_the_law_holds_for_emulated_reductions(tp_size, kind):
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(40_000, generator=generator, dtype=torch.float64) for _ in range(tp_size)]
    y = sum(terms)
    at_1 = float((y.bfloat16().double() - y).square().mean().sqrt())
    # fp32 on the wire means the partials never were in bfloat16.
    operands = [t.float() if kind == "fp32_wire" else t.bfloat16() for t in terms]
    got = reduce_sum(operands, kind).bfloat16().double()
    ratio = float((got - y).square().mean().sqrt()) / at_1
    assert ratio == pytest.approx(expected_ratio(tp_size, kind), rel=0.08)


def test_one_rank_costs_nothing():
    assert all(expected_ratio(1, kind) == 1 for kind in ("ring", "tree", "wide", "fp32_wire"))


def test_a_limit_never_falls_below_what_clean_models_reach():
    assert ratio_limit(1.0) == ratio_limit(1.99) == RATIO_FLOOR
    assert ratio_limit(14.6) == pytest.approx(21.9)


def test_an_exact_tp1_is_lifted_to_the_floor():
    assert floored(0.0, 2.0, 0.0078125) == ERROR_FLOOR * 0.0078125 * 2.0
    assert floored(1.0, 2.0, 0.0078125) == 1.0
    assert floored(0.0, 0.0, 0.0078125) == 0.0


def test_the_structural_limit_is_a_constant_or_a_multiple_of_the_measured_floor():
    assert structural_limit(0.0) == STRUCTURAL_LIMIT
    assert structural_limit(1e-7) == NOISE_FACTOR * 1e-7


def test_no_user_no_tolerance():
    assert users_tolerance(None, None, None) is None


@pytest.mark.parametrize(
    ("atol", "rtol", "preset", "expected"),
    [
        (1e-3, None, None, (0.0, 1e-3, "user")),
        (None, 1e-3, None, (1e-3, 0.0, "user")),
        (0.0, 0.0, None, (0.0, 0.0, "user")),
        (None, None, "seed-1e-2", (1e-2, 1e-2, "preset seed-1e-2")),
    ],
)
def test_a_users_tolerance_stands_as_given_and_decides(atol, rtol, preset, expected):
    found = users_tolerance(atol, rtol, preset)
    assert (found.rtol, found.atol, found.source) == expected
    assert found.decides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, None, "seed"), "preset='seed', but should be one of seed-1e-2"),
        ((0.1, None, "seed-1e-2"), "preset='seed-1e-2' and --atol/--rtol cannot be combined"),
        ((-1.0, None, None), "atol=-1.0, but should be a finite number >= 0"),
        ((None, math.nan, None), "rtol=nan, but should be a finite number >= 0"),
        ((math.inf, None, None), "atol=inf, but should be a finite number >= 0"),
    ],
)
def test_an_impossible_tolerance_is_named(arguments, message):
    with pytest.raises(TPCheckError) as error:
        users_tolerance(*arguments)
    assert str(error.value) == message


def test_a_tolerance_without_a_source_is_no_tolerance():
    with pytest.raises(TPCheckError, match="a tolerance needs a source"):
        Tolerance(0.0, 0.0, "")


def test_a_derived_tolerance_says_where_it_comes_from_and_does_not_decide():
    found = derived_tolerance(1e-3, 3.0, 4096)
    assert found.source == "derived: 19.2 x e1=0.001"
    assert found.atol == pytest.approx(19.2e-3, rel=5e-3)
    assert found.rtol == 0
    assert not found.decides


@pytest.mark.parametrize("count", [16, 4096, 100_000])
def test_a_derived_tolerance_holds_for_normal_errors_at_the_limit(count):
    generator = torch.Generator().manual_seed(count)
    error = torch.randn(count, generator=generator) * math.sqrt(1 + 3.0**2)
    assert float(error.abs().max()) < derived_tolerance(1.0, 3.0, count).atol


@pytest.mark.parametrize("count", [6, 20, 100, 1000])
def test_the_sampling_spread_is_the_quantile_it_says(count):
    generator = torch.Generator().manual_seed(count)
    draws = torch.randn((20_000, 2, count), generator=generator, dtype=torch.float64)
    first, second = draws.square().mean(-1).sqrt().unbind(1)
    ratios = first / second
    assert (ratios > sampling_spread(count)).sum() <= 2, "1e-5 of 20,000 draws is 0.2"
    assert ratios.max() > 0.3 * sampling_spread(count), "and not a bound that anything meets"


def test_few_massive_errors_count_as_few():
    errors = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    even = effective_count(float(errors.square().sum()), float(errors.pow(4).sum()), 1000)
    errors[:4] *= 1000
    few = effective_count(float(errors.square().sum()), float(errors.pow(4).sum()), 1000)
    assert 800 < even <= 1000
    assert few < 12
    assert effective_count(0.0, 0.0, 7) == 7


def test_many_errors_leave_the_limit_where_it_was():
    assert ratio_limit(1.8, 10_000) == RATIO_FLOOR
    assert ratio_limit(1.41, 7) > 2 * RATIO_FLOOR
