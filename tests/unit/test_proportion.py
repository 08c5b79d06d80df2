"""Exact bounds of a proportion, against values known from tables and from closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.numerics.proportion import at_least, clopper_pearson


@pytest.mark.parametrize(
    ("successes", "trials", "lower", "upper"),
    [
        (0, 10, 0.0, 0.308497),
        (1, 10, 0.002529, 0.445016),
        (5, 10, 0.187086, 0.812914),
        (10, 10, 0.691503, 1.0),
        (1, 20, 0.001265, 0.248733),
        (3, 50, 0.012549, 0.165482),
    ],
)
def test_bounds_are_those_of_the_tables(successes, trials, lower, upper):
    found = clopper_pearson(successes, trials)
    assert found == pytest.approx((lower, upper), abs=2e-6)


@pytest.mark.parametrize("trials", [1, 7, 300, 30_000])
def test_none_and_all_have_a_closed_form(trials):
    missed = 0.025 ** (1 / trials)
    assert clopper_pearson(trials, trials) == pytest.approx((missed, 1.0), rel=1e-9)
    assert clopper_pearson(0, trials)[0] == 0.0
    assert clopper_pearson(0, trials)[1] == pytest.approx(-math.expm1(math.log(missed)), rel=1e-6)


def test_no_trials_say_nothing():
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_bounds_enclose_what_was_seen_and_mirror_its_complement(counts):
    successes, trials = counts
    lower, upper = clopper_pearson(successes, trials)
    assert lower <= successes / trials <= upper
    mirrored = clopper_pearson(trials - successes, trials)
    assert (1 - upper, 1 - lower) == pytest.approx(mirrored, abs=1e-12)
    assert clopper_pearson(successes, trials, 0.99)[0] <= lower


@pytest.mark.parametrize(("successes", "proportion"), [(0, 0.3), (3, 1.0), (1, 0.0)])
def test_tails_at_the_edges(successes, proportion):
    assert at_least(successes, 3, proportion) == (0.0 if successes and not proportion else 1.0)


@pytest.mark.parametrize("arguments", [(-1, 3), (4, 3), (1, 3, 0.0), (1, 3, 1.0)])
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match="but should be"):
        clopper_pearson(*arguments)
