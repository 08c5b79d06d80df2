"""The alarm on a reduction class: the law, what it raises, what it must not raise, how soon.

A clean run's local products are in float32, and its ring begins at another rank than the emulated
one, so that its bits are not the emulation's.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.row_parallel import FAMILIES, layer
from tpcheck.numerics.alarm import (
    JUDGED,
    RATE,
    TOLERATED,
    Declared,
    Wealth,
    declare,
    law_sigma,
    outputs_needed,
)
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.reduction import reduce_sum

torch.set_num_threads(1)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMIT = math.log(2 / RATE)


def summed(sent, kind, dtype, start=0):
    """Sum terms that a kernel accumulated in float32, in an order that begins at another rank."""
    terms = sent if kind == "fp32_wire" else sent.to(dtype)
    return reduce_sum(list(terms.roll(start, 0)), kind).to(dtype)


def run(actual, declared, dtype, *, cases=8, tp_size=8, family="independent", start=0, **sizes):
    """Return the wealth after cases of one reduction where another is declared."""
    wealth = Wealth()
    for seed in range(cases):
        exact, sent = layer(seed, tp_size, family, dtype, **sizes)
        given_N = summed(sent, actual, dtype, start)
        wealth = wealth.after(given_N, declare(exact, declared, dtype))
    return wealth


def rms(x):
    return float(x.square().mean().sqrt())


# The law.


@pytest.mark.parametrize("tp_size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_the_law_is_within_15_percent_and_the_emulation_within_3(tp_size, family, even):
    for dtype, kind in itertools.product((BF16, FP16), JUDGED):
        exact, sent = layer(1, tp_size, family, dtype, tokens=64, hidden=256, even=even)
        if kind == "fp32_wire":  # a total that cancels shows the local products
            exact = sent.double()
        errors = summed(sent, kind, dtype).double() - exact.sum(0)
        sigma = law_sigma(exact, kind, dtype)
        law = rms((errors / sigma)[sigma > 0])
        assert 1 / 1.15 < law < 1.15, (dtype, kind, law)
        other = summed(sent, kind, dtype, 0 if kind == "tree" else 1)
        excess = Wealth().after(other, declare(exact, kind, dtype)).excess
        assert 0.97 < excess < 1.03, (dtype, kind, excess)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_the_law_is_numerics_table(tp_size):
    # NUMERICS, section 2: in units of the TP=1 error, K=4096, N=1024, B=64.
    table = {2: (1.47, 1.47, 1.47), 4: (1.91, 1.83, 1.42), 8: (2.44, 2.13, 1.42)}[tp_size]
    exact, _ = layer(0, tp_size, dtype=BF16, tokens=64, hidden=256, inner=1024)
    total = exact.sum(0)
    at_1 = rms(total.bfloat16().double() - total)
    for kind, measured in zip(("ring", "tree", "wide"), table, strict=True):
        assert rms(law_sigma(exact, kind, BF16)) / at_1 == pytest.approx(measured, rel=0.03)


def test_two_numbers_of_one_binade_leave_nothing_or_half_a_step():
    terms = 1 + torch.randint(0, 128, (2, 40_000), generator=torch.Generator().manual_seed(0)) / 128
    errors = reduce_sum(list(terms.bfloat16()), "wide").double() - terms.double().sum(0)
    sigma = law_sigma(terms.double(), "wide", BF16)  # the terms are bfloat16: only the sum rounds
    torch.testing.assert_close(sigma, torch.full_like(sigma, 2.0**-6 / math.sqrt(8)))
    assert rms(errors / sigma) == pytest.approx(1, abs=0.02)


def test_the_law_of_a_float32_layer_holds_for_the_partials_that_were_sent():
    _, sent = layer(2, 8, dtype=FP32, tokens=64, hidden=128)
    partials = sent.double()
    for kind in JUDGED:
        errors = reduce_sum(list(sent), kind).double() - partials.sum(0)
        sigma = law_sigma(partials, kind, FP32)
        assert not errors[sigma == 0].any()
        assert rms((errors / sigma)[sigma > 0]) == pytest.approx(1, abs=0.05), kind


def test_normalized_errors_have_hardly_heavier_tails_than_the_normal():
    for family, kind in itertools.product(FAMILIES, ("ring", "tree", "wide")):
        exact, sent = layer(3, 8, family, BF16, tokens=64, hidden=256)
        declared = declare(exact, kind, BF16)
        z = (summed(sent, kind, BF16).double() - declared.exact) / declared.sigma
        assert 2.0 < float(z.pow(4).mean() / z.square().mean() ** 2) < 3.5  # 3 is the normal's


# What it raises.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("tp_size", [4, 8])
@pytest.mark.parametrize("kind", ["ring", "tree"])
def test_adds_rounded_per_hop_where_a_wide_accumulator_was_declared(kind, tp_size, dtype, family):
    wealth = run(kind, "wide", dtype, tp_size=tp_size, family=family, cases=4)
    assert wealth.alarm() == "wider"
    assert wealth.excess > 1.2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [4, 8])
def test_a_wide_accumulator_where_a_ring_was_declared_is_narrower(tp_size, family):
    wealth = run("wide", "ring", BF16, tp_size=tp_size, family=family, cases=4)
    assert wealth.alarm() == "narrower"
    assert wealth.excess < 0.9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", JUDGED)
@pytest.mark.parametrize("tp_size", [2, 8])
def test_any_excess_of_1_35_is_found_within_2000_outputs(tp_size, kind, family):
    wealth, generator = Wealth(), torch.Generator().manual_seed(0)
    for seed in range(2):
        exact, sent = layer(seed, tp_size, family, BF16)
        declared = declare(exact, kind, BF16)
        clean = summed(sent, kind, BF16, 1 if kind == "ring" else 0).double()
        level = rms(declared.errors / declared.sigma)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        extra = noise * declared.sigma * level * math.sqrt(1.35**2 - 1)
        wealth = wealth.after(clean + extra, declared)
    assert wealth.alarm() == "wider"
    assert wealth.excess == pytest.approx(1.35, abs=0.06)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_nan_or_infinity_is_an_alarm_and_stays_one(value):
    exact, sent = layer(0, 4)
    declared = declare(exact, "ring", BF16)
    actual = summed(sent, "ring", BF16)
    assert Wealth().after(actual, declared).alarm() == ""
    broken = actual.clone()
    broken[17] = value
    wealth = Wealth().after(broken, declared)
    assert wealth.alarm() == wealth.after(actual, declared).alarm() == "wider"
    assert wealth.excess == math.inf


def test_an_overflow_that_the_declared_class_has_too_is_none_of_its_errors():
    exact, sent = layer(0, 4, dtype=FP16)
    for terms in (exact, sent):
        terms[:2, 5] = 40000.0
        terms[2:, 5] = -30000.0
    ring, wide = (summed(sent, kind, FP16) for kind in ("ring", "wide"))
    tree = reduce_sum(list(sent.half()), "tree")
    assert tree[5].isinf()
    assert wide[5].isfinite()
    assert Wealth().after(tree, declare(exact, "tree", FP16)).alarm() == ""
    assert Wealth().after(tree, declare(exact, "wide", FP16)).alarm() == "wider"
    assert Wealth().after(ring, declare(exact, "ring", FP16)).count >= 1023


# What it must not raise.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp_size", [3, 4, 8])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_a_ring_that_begins_elsewhere_is_the_declared_one(tp_size, family, even):
    for dtype in (BF16, FP16):
        wealth = run(
            "ring", "ring", dtype, cases=12, tp_size=tp_size, family=family, start=1, even=even
        )
        assert wealth.alarm() == ""
        assert max(wealth.wider, wealth.narrower) < 0
        assert wealth.squares != wealth.expected  # other bits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wide_accumulator_in_another_order_and_a_tree_are_the_declared_ones(family):
    assert run("wide", "wide", BF16, family=family, start=3).alarm() == ""
    assert run("tree", "tree", FP16, family=family).alarm() == ""
    assert run("fp32_wire", "fp32_wire", FP16, family=family, start=2, even=False).alarm() == ""


@pytest.mark.parametrize("outputs", [1, 8])
def test_few_outputs_a_case_raise_nothing_however_many_cases(outputs):
    wealth, highest = Wealth(), -math.inf
    for seed in range(400):
        exact, sent = layer(seed, 8, tokens=1, hidden=outputs, inner=64)
        actual = reduce_sum(list(sent.bfloat16().flip(0)), "ring")
        wealth = wealth.after(actual, declare(exact, "ring", BF16))
        highest = max(highest, wealth.wider, wealth.narrower)
    assert highest < LIMIT
    assert wealth.count == 400 * outputs


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 20, 400]))
@settings(deadline=None, max_examples=40)
def test_the_bets_are_fair_for_normal_errors_up_to_what_is_tolerated(seed, count):
    # Ville's bound at a rate that can be seen: 400 runs of 10 cases exceed 1 / 0.05 in at most 5 %.
    generator = torch.Generator().manual_seed(seed)
    shape = (400, 10, count)
    actual = torch.randn(shape, generator=generator) * TOLERATED
    emulated = torch.randn(shape, generator=generator)
    ratio = (actual.square().sum(-1) / emulated.square().sum(-1)).double()
    log_wealth = (
        count
        * (
            torch.log1p(ratio / TOLERATED**2)
            - torch.log1p(ratio / TOLERATED**2 / 1.15**2)
            - math.log(1.15)
        )
    ).cumsum(1)
    exceeded = int((log_wealth.amax(1) > math.log(1 / 0.05)).sum())
    assert exceeded <= 50  # 20 expected at most; 50 has a chance below 1e-8


def test_the_same_bits_never_gain():
    wealth = run("ring", "ring", BF16)
    assert wealth.excess == pytest.approx(1, abs=1e-3)
    assert max(wealth.wider, wealth.narrower) < -100


def test_zeros_are_not_judged_and_exact_sums_are_as_declared():
    exact, sent = layer(0, 4)
    exact[:, ::2], sent[:, ::2] = 0, 0
    wealth = Wealth().after(summed(sent, "ring", BF16, 1), declare(exact, "ring", BF16))
    assert wealth.count == exact.shape[1] // 2
    assert wealth.alarm() == ""
    whole = torch.arange(400, dtype=torch.float64).view(4, 100) % 8
    actual = reduce_sum(list(whole.bfloat16()), "ring")
    assert Wealth().after(actual, declare(whole, "ring", BF16)).excess == 1


def test_mirrored_partials_that_cancel_exactly_say_nothing():
    half, sent = layer(0, 4)
    exact, sent = torch.cat([half, -half]), torch.cat([sent, -sent])
    for actual, declared in [("tree", "tree"), ("wide", "wide"), ("tree", "wide")]:
        wealth = Wealth()
        for start in (1, 4):
            given_N = summed(sent, actual, BF16, start if actual == "wide" else 0)
            wealth = wealth.after(given_N, declare(exact, declared, BF16))
        assert wealth.alarm() == ""
    off = summed(sent, "tree", BF16) + half.sum(0).bfloat16()
    assert Wealth().after(off, declare(exact, "tree", BF16)).alarm() == "wider"


def test_inputs_that_are_not_finite_are_not_the_reductions():
    exact, sent = layer(0, 4)
    for terms in (exact, sent):
        terms[1, 3], terms[2, 4] = math.nan, math.inf
    wealth = Wealth().after(summed(sent, "ring", BF16, 1), declare(exact, "ring", BF16))
    assert (wealth.count, wealth.alarm()) == (exact.shape[1] - 2, "")


def test_nothing_seen_is_no_excess_and_no_alarm():
    assert (Wealth().excess, Wealth().alarm()) == (1.0, "")
    empty = torch.zeros(4, 0, dtype=torch.float64)
    assert Wealth().after(torch.zeros(0, dtype=BF16), declare(empty, "ring", BF16)) == Wealth()


def test_one_rank_leaves_one_rounding():
    exact, sent = layer(0, 1)
    for kind in ("ring", "tree", "wide", "fp32_wire"):
        wealth = Wealth().after(summed(sent, kind, BF16), declare(exact, kind, BF16))
        assert wealth.excess == pytest.approx(1, abs=1e-3)


# How soon.


@pytest.mark.parametrize("excess", [1.2, 1.33, 1.72, 3.0, 0.75, 0.5])
def test_outputs_needed_is_what_normal_errors_take(excess):
    needed, generator, taken = outputs_needed(excess), torch.Generator().manual_seed(1), []
    for _ in range(60):
        wealth = Wealth()
        exact = torch.zeros(16)
        while not wealth.alarm():
            z, emulated = torch.randn(2, 16, generator=generator).double()
            declared = declare_of(exact, emulated)
            wealth = wealth.after(z * excess, declared)
        assert wealth.alarm() == ("wider" if excess > 1 else "narrower")
        taken.append(wealth.count)
    # Steps of 16 outputs overshoot, and the level of 16 costs some: never less than expected.
    assert 0.9 * needed < sum(taken) / 60 < 1.5 * needed + 48


def declare_of(exact, emulated):
    return Declared(exact.double(), torch.ones_like(emulated), emulated)


@pytest.mark.parametrize("excess", [1.0, TOLERATED, 1 / TOLERATED, 1.1, 0.93])
def test_what_is_nearly_as_declared_is_never_found(excess):
    assert outputs_needed(excess) == math.inf


def test_the_power_curve_falls_from_the_least_excess():
    curve = [outputs_needed(excess) for excess in (1.2, 1.33, 1.35, 1.72, 3.0)]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] < 2000
    assert curve[2] < 650


# What is refused.


@pytest.mark.parametrize("kind", [*LOW_PRECISION, "ascending ring"])
def test_a_kind_without_a_law_is_refused_by_name(kind):
    for function in (declare, law_sigma):
        with pytest.raises(ValueError, match=f"kind='{kind}', but should be one of ring, tree"):
            function(torch.zeros(2, 3, dtype=torch.float64), kind, BF16)


def test_float64_outputs_are_refused():
    with pytest.raises(ValueError, match=r"dtype=torch.float64, but should be bfloat16"):
        declare(torch.zeros(2, 3, dtype=torch.float64), "ring", torch.float64)


def test_outputs_of_another_layer_are_refused():
    declared = declare(torch.zeros(2, 3, dtype=torch.float64), "ring", BF16)
    with pytest.raises(ValueError, match="actual has 1 outputs, but should have 3"):
        Wealth().after(torch.zeros(1), declared)
