"""The noise injected into a float64 run predicts what a real reduction in the dtype drifts.

Both are simulated on the same partials: the deployed dtype's ring, and float64 with the noise of
that ring on top, in 6,000 elements.
"""

import math

import pytest
import torch

from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.observation.injection import reduction_noise

torch.set_num_threads(1)
COUNT = 6000


def call(world, body):
    return body(world)


def on_ranks(body, size, reduction="ring"):
    (result,) = SimulatedRanks(reduction).run([Job(f"{__name__}:call", body, size, 60.0)])
    assert result.failure is None, result.failure
    return result.replies


def normal(seed):
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def independent(size):
    return [normal(rank) for rank in range(size)]


def coherent(size):
    return [normal(99) + normal(rank) / 4 for rank in range(size)]


def cancelling(size):
    return [normal(99) * (-1) ** rank + normal(rank) / 16 for rank in range(size)]


def outlier(size):
    return [normal(rank) * (64 if rank == size // 2 else 1) for rank in range(size)]


def rms(x):
    return float(x.double().square().mean().sqrt())


def injected(partials, dtype, kind="ring", op=lambda tp, x: tp.all_reduce(x), noise_kind=None):
    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        exact = op(tp, partials[world.rank])
        tp.interceptor = reduction_noise(dtype, noise_kind or kind, seed=1)
        return op(tp, partials[world.rank]) - exact

    return on_ranks(body, len(partials), kind)


def measured(partials, dtype, kind="ring"):
    """rms error of the reduction in `dtype`, and that of one rounding of the exact sum."""
    exact = sum(partials)
    narrow = getattr(torch, dtype)

    def body(world):
        tp = world.group(seed=0, dtype=narrow, weight_dtype=narrow)
        return tp.all_reduce(partials[world.rank].to(narrow))

    reduced = on_ranks(body, len(partials), kind)[0]
    return rms(reduced.double() - exact), rms(exact.to(narrow).double() - exact)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("partials", [independent, coherent, cancelling, outlier])
def test_injected_noise_predicts_the_drift_of_a_bfloat16_ring(partials, size):
    terms = partials(size)
    error, at_1 = measured(terms, "bfloat16")
    response = rms(injected(terms, "bfloat16")[0])
    predicted = math.sqrt(at_1**2 + response**2)
    assert predicted == pytest.approx(error, rel=0.07)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", ["ring", "tree"])
def test_it_predicts_other_dtypes_and_trees(dtype, kind):
    terms = independent(8)
    error, at_1 = measured(terms, dtype, kind)
    response = rms(injected(terms, dtype, kind)[0])
    assert math.sqrt(at_1**2 + response**2) == pytest.approx(error, rel=0.1)


def test_cancelling_partials_explain_a_drift_above_any_fixed_limit():
    terms = cancelling(8)
    error, at_1 = measured(terms, "bfloat16")
    assert error / at_1 > 10
    assert rms(injected(terms, "bfloat16")[0]) / at_1 > 10


def test_every_rank_gets_the_same_noise():
    first, *others = injected(independent(4), "bfloat16")
    assert first.count_nonzero() > COUNT * 0.9
    assert all(torch.equal(first, other) for other in others)


def test_the_same_seed_draws_the_same_noise_and_each_call_its_own():
    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        tp.interceptor = reduction_noise("bfloat16", "ring", seed=1)
        return tp.all_reduce(normal(world.rank)), tp.all_reduce(normal(world.rank))

    (first, second), again = on_ranks(body, 2)[0], on_ranks(body, 2)[0]
    assert torch.equal(first, again[0])
    assert not torch.equal(first, second)


def test_a_scattered_sum_gets_its_piece_of_the_same_noise():
    terms = independent(4)
    whole = injected(terms, "bfloat16")[0]
    pieces = injected(terms, "bfloat16", op=lambda tp, x: tp.reduce_scatter(x, 0))
    # float64's own rounding of sum + noise differs between the two
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-9, atol=1e-12)


def test_an_average_gets_the_noise_of_its_sum_divided():
    terms = independent(4)
    whole = injected(terms, "bfloat16")[0]
    mean = injected(terms, "bfloat16", op=lambda tp, x: tp.all_reduce(x, "avg"))[0]
    torch.testing.assert_close(mean * 4, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "op",
    [
        lambda tp, x: tp.all_reduce(x, "max"),
        lambda tp, x: tp.all_reduce(x, "min"),
        lambda tp, x: tp.all_gather(x, 0),
        lambda tp, x: tp.broadcast(x, 0),
    ],
)
def test_what_adds_nothing_up_rounds_nothing(op):
    assert all(not noise.any() for noise in injected(independent(4), "bfloat16", op=op))


def test_one_rank_reduces_nothing():
    assert not injected(independent(1), "bfloat16")[0].any()


def carried_in(partials, wire, dtype="bfloat16"):
    """rms error of partials rounded to `dtype`, ring-summed in `wire` and rounded back."""
    exact, narrow = sum(partials), getattr(torch, dtype)

    def body(world):
        tp = world.group(seed=0, dtype=narrow, weight_dtype=narrow)
        return tp.all_reduce(partials[world.rank].to(narrow).to(getattr(torch, wire))).to(narrow)

    reduced = on_ranks(body, len(partials))[0]
    return rms(reduced.double() - exact), rms(exact.to(narrow).double() - exact)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("partials", [independent, coherent, cancelling, outlier])
@pytest.mark.parametrize(
    ("dtype", "wire"),
    [("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")],
)
def test_a_wire_of_another_dtype_is_predicted(size, partials, dtype, wire):
    terms = partials(size)
    error, at_1 = carried_in(terms, wire, dtype)

    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        exact = tp.all_reduce(terms[world.rank])
        tp.interceptor = reduction_noise(dtype, "ring", 1, wire)
        return tp.all_reduce(terms[world.rank]) - exact

    response = rms(on_ranks(body, size)[0])
    assert math.sqrt(at_1**2 + response**2) == pytest.approx(error, rel=0.07)


@pytest.mark.parametrize("wire", ["", "float32", "float16"])
def test_what_one_rank_holds_and_the_dtype_can_hold_costs_nothing(wire):
    rows = torch.where(torch.arange(COUNT) % 4 == 1, normal(3).bfloat16().double(), 0.0)
    terms = [torch.zeros(COUNT).double(), rows, torch.zeros(COUNT).double()]

    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        tp.interceptor = reduction_noise("bfloat16", "ring", 1, wire)
        return tp.all_reduce(terms[world.rank])

    assert torch.equal(on_ranks(body, 3)[0], rows)


@pytest.mark.parametrize("size", [4, 8])
def test_a_cast_of_the_subjects_own_is_the_wire_that_is_deployed(size):
    """`all_reduce(partial.float())` rounds terms and total, whatever the deployed dtype."""
    terms = independent(size)
    error, at_1 = carried_in(terms, "float32")

    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        exact = tp.all_reduce(terms[world.rank].float()).double()
        tp.interceptor = reduction_noise("bfloat16", "ring", 1)
        return tp.all_reduce(terms[world.rank].float()).double() - exact

    response = rms(on_ranks(body, size)[0])
    assert math.sqrt(at_1**2 + response**2) == pytest.approx(error, rel=0.05)
    assert rms(injected(terms, "bfloat16")[0]) > 1.3 * response


def test_integers_are_summed_exactly():
    """Counts beyond what the deployed dtype holds are still no floats."""

    def body(world):
        tp = world.group(seed=0, dtype=torch.float64, weight_dtype=torch.bfloat16)
        tp.interceptor = reduction_noise("bfloat16", "ring", 1)
        return tp.all_reduce(torch.full((64,), 10_007 * (world.rank + 1)))

    assert torch.equal(on_ranks(body, 3)[0], torch.full((64,), 60_042))
