"""A rank's wrong factor in rounded outputs, with the numbers of NUMERICS, section 2."""

import math

import pytest
import torch

from benchmarks.row_parallel import FAMILIES, layer
from tpcheck.numerics.reduction import reduce_sum
from tpcheck.numerics.regression import SIGNIFICANT, most_scaled_rank

torch.set_num_threads(1)
BF16 = torch.bfloat16


def found(scale, *, seed=0, rank=5, tp_size=8, family="independent", kind="ring", **sizes):
    exact, sent = layer(seed, tp_size, family, BF16, **sizes)
    sent[rank] *= scale
    actual = reduce_sum(list(sent.bfloat16()), kind).double()
    return most_scaled_rank(exact, actual - exact.sum(0))


# K=4096, N=1024, B=64: 65,536 outputs.
NUMERICS = {"tokens": 64, "hidden": 1024, "inner": 4096}


@pytest.mark.parametrize(("exponent", "z"), [(-7, 174), (-10, 23), (-11, 11)])
def test_the_numbers_of_numerics_are_met(exponent, z):
    one = found(1 + 2.0**exponent, **NUMERICS)
    assert one.rank == 5
    assert one.significant
    assert one.factor == pytest.approx(1 + 2.0**exponent, abs=2.0**-12)
    assert one.z == pytest.approx(z, rel=0.25)


def test_a_clean_reduction_of_that_size_has_no_significant_rank():
    assert abs(found(1.0, **NUMERICS).z) < 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ring", "tree", "wide"])
def test_clean_reductions_stay_well_below_what_counts(family, kind):
    scores = [
        abs(found(1.0, seed=seed, family=family, kind=kind, even=seed % 2 == 0).z)
        for seed in range(12)
    ]
    assert max(scores) < 5 < SIGNIFICANT


@pytest.mark.parametrize("rank", range(8))
def test_every_rank_is_named_also_with_uneven_shards(rank):
    one = found(1 + 2.0**-5, rank=rank, even=False, tokens=64, hidden=256)
    assert (one.rank, one.significant) == (rank, True)


def test_a_missing_rank_counts_no_times():
    one = found(0.0, rank=2)
    assert (one.rank, one.factor) == (2, pytest.approx(0, abs=1e-3))


def test_an_exact_sum_with_a_wrong_factor_is_infinitely_sure_and_finite():
    exact, _ = layer(0, 4)
    one = most_scaled_rank(exact, 0.5 * exact[1])
    assert (one.rank, one.factor) == (1, pytest.approx(1.5))
    assert math.isfinite(one.z)
    assert not most_scaled_rank(exact, torch.zeros(exact.shape[1]).double()).significant


def test_terms_that_are_multiples_of_each_other_blame_nobody():
    exact, _ = layer(0, 4)
    exact[2] = exact[1] * 3
    assert most_scaled_rank(exact, exact[1] * 0.1) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_say_nothing(value):
    exact, _ = layer(0, 4)
    errors = exact[0] * 0.1
    broken = exact.clone()
    broken[1, 7] = value
    assert most_scaled_rank(broken, errors) is None
    errors[3] = value
    assert most_scaled_rank(exact, errors) is None


@pytest.mark.parametrize("count", [0, 1, 8])
def test_too_few_outputs_say_nothing(count):
    terms = torch.randn(4, count, generator=torch.Generator().manual_seed(0)).double()
    assert most_scaled_rank(terms, torch.ones(count).double()) is None


def test_a_rank_without_a_term_says_nothing():
    exact, _ = layer(0, 4)
    exact[3] = 0
    assert most_scaled_rank(exact, exact[1] * 0.1) is None


def test_errors_of_another_layer_are_refused():
    with pytest.raises(ValueError, match="errors have 3 outputs, but should have 4"):
        most_scaled_rank(torch.zeros(2, 4).double(), torch.zeros(3).double())
