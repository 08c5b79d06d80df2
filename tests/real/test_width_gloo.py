"""Width on real Gloo ranks: every number is there and they fit; how long is not judged."""

import pytest

from tests.unit.test_fallback_measuring import task_of
from tpcheck.fallback.measuring import fallback_effects
from tpcheck.groups.pool import RankPool
from tpcheck.width_cost import width_cost


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as ranks:
        yield ranks


def test_a_real_forward_is_timed_with_its_all_reduces(pool):
    task = task_of("builtin:llama-tiny", "bfloat16")
    cost = width_cost(pool, task, (2,), sizes=(1024, 65536))
    assert cost.measured_on.startswith("gloo on cpu, ")
    assert cost.measured_on.endswith("says nothing of a GPU")
    alone, two = cost.degrees
    assert (alone.tp_size, two.tp_size) == (1, 2)
    assert alone.share == 0
    assert 0 < two.share < 1
    assert two.imbalance >= 1
    assert two.fastest_s <= two.forward_s <= two.slowest_s
    assert 0 < two.communication_s < two.slowest_s
    rows, layers, hidden, itemsize = 2 * 8, 2, 64, 2
    (reduced,) = two.all_reduces
    assert (reduced.nbytes, reduced.calls) == (rows * hidden * itemsize, 2 * layers + 1)
    assert [one.nbytes for one in two.bandwidths] == [1024, 65536]
    for one in two.bandwidths:
        assert one.bytes_per_second == pytest.approx(one.nbytes / one.seconds)
    assert cost.recommendation.startswith(("tp=1: a forward takes", "tp=2: a forward takes"))
    assert cost.recommendation.endswith(f"[{cost.measured_on}]")


def test_collectives_of_torch_distributed_are_timed_as_well(pool):
    task = task_of("tests/subjects/dtensor.py:local_logits", "bfloat16")
    _, two = width_cost(pool, task, (2,), sizes=(1024,)).degrees
    assert two.reason == ""
    assert 0 < two.share < 1
    (reduced,) = two.all_reduces
    rows, hidden, itemsize = 2 * 8, 32, 2
    assert (reduced.nbytes, reduced.calls) == (rows * hidden * itemsize, 2)


def test_real_ranks_time_what_a_level_costs(pool):
    task = task_of("builtin:llama-tiny", "bfloat16")
    (full,) = fallback_effects(pool, task, 2, ("full",))
    assert full.same_bits_as_tp1
    assert full.seconds > 0
    assert full.seconds_deployed > 0
    assert full.device_peak_bytes is None, "CPU has no allocator that keeps a peak"
