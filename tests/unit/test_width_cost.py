"""What width costs, from made-up clocks: what is derived from them, never how long it took."""

import pytest

from tests.unit.test_fallback_measuring import task_of
from tpcheck.errors import TPCheckError
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.render.width import render_width
from tpcheck.width_cost import (
    Bandwidth,
    DegreeCost,
    RankTimes,
    SizeCost,
    WidthCost,
    degree_cost,
    recommendation,
    width_cost,
)


def degree(tp_size, fastest, middle, slowest, share=0.5):
    return DegreeCost(tp_size, middle, fastest, slowest, share * middle, share, 1.0, (), ())


CALLS = (("all_reduce", 64, 2.0), ("all_gather", 32, 1.0), ("all_reduce", 64, 4.0))
WAITED = (("all_reduce", 64, 5.0), ("all_gather", 32, 1.5), ("all_reduce", 64, 3.0))


def test_a_degree_is_what_its_ranks_clocks_say():
    late = RankTimes((17.0,) * 3, ((17.0, CALLS),) * 3, ((64, 0.5), (128, 1.0)), "cpu")
    early = RankTimes((16.0,) * 3, ((16.0, WAITED),) * 3, ((64, 0.25), (128, 2.0)), "cpu")
    found = degree_cost(2, (late, early))
    assert (found.forward_s, found.fastest_s, found.slowest_s) == (17.0, 17.0, 17.0)
    assert found.communication_s == 2.0 + 1.0 + 3.0, "the least that any rank spent in each"
    assert found.share == pytest.approx(6 / 17)
    own = (17.0 - 7.0, 16.0 - 9.5)
    assert found.imbalance == pytest.approx(max(own) / (sum(own) / 2))
    assert found.all_reduces == (SizeCost(64, 2, 2.5),)
    assert found.bandwidths == (Bandwidth(64, 0.5, 128.0), Bandwidth(128, 2.0, 64.0))


def test_bus_bandwidth_counts_what_a_ring_moves():
    clock = RankTimes((1.0,), ((1.0, CALLS),), ((800, 1.0),), "cpu")
    found = degree_cost(8, (clock,) * 8)
    assert found.bandwidths[0].bytes_per_second == 800 * 2 * 7 / 8


def test_one_rank_has_no_communication():
    clock = RankTimes((1.0, 3.0, 2.0), ((1.0, CALLS),) * 3, (), "cpu")
    found = degree_cost(1, (clock,))
    assert (found.forward_s, found.fastest_s, found.slowest_s) == (2.0, 1.0, 3.0)
    assert (found.communication_s, found.share, found.all_reduces) == (0.0, 0.0, ())


def test_collectives_that_cannot_be_seen_are_no_zero():
    clock = RankTimes((1.0,), ((1.0, ()),), (), "cpu")
    found = degree_cost(2, (clock, clock))
    assert found.share is None
    assert found.communication_s is None
    assert "no collective was seen" in found.reason


def test_the_recommendation_names_its_evidence():
    said = recommendation([degree(1, 9, 10, 11), degree(2, 5, 6, 7), degree(4, 3, 4, 4.5)], "gloo")
    assert said == (
        "tp=4: a forward takes 4e+03 ms (50 % of it communication), against 1e+04 ms at tp=1,"
        " 6e+03 ms at tp=2 (50 % of it communication) [gloo]"
    )


def test_a_wider_degree_has_to_beat_the_spread_of_repeats():
    said = recommendation([degree(1, 9, 10, 11), degree(2, 8, 9, 9.5)], "gloo")
    assert said.startswith("tp=1:")
    assert "tp=2 is within the spread of repeats [gloo]" in said
    assert recommendation([degree(1, 9, 10, 11), degree(2, 7, 8, 8.9)], "x").startswith("tp=2:")
    assert "spread" not in recommendation([degree(1, 1, 2, 3), degree(2, 7, 8, 9)], "x")


def test_simulated_ranks_have_no_times():
    with pytest.raises(TPCheckError, match="width: backend=sim, but should be gloo or nccl"):
        width_cost(SimulatedRanks(), task_of("builtin:llama-tiny"), (2,))


class NoRanks:
    label = "gloo"
    max_size = 8

    def run(self, jobs):
        raise AssertionError("nothing should run")


@pytest.mark.parametrize(("sizes", "degrees"), [((64,), (1,)), ((), (2,)), ((0,), (2,))])
def test_what_cannot_be_measured_is_refused(sizes, degrees):
    with pytest.raises(TPCheckError, match="should name a degree above 1 and a size above 0"):
        width_cost(NoRanks(), task_of("builtin:llama-tiny"), degrees, sizes=sizes)


def test_the_table_begins_with_where_it_was_measured():
    degrees = (
        degree(1, 0.001, 0.002, 0.003, 0.0),
        DegreeCost(
            2, 0.004, 0.003, 0.005, None, None, None, (SizeCost(64, 2, 0.001),),
            (Bandwidth(64, 0.002, 5e6), Bandwidth(128, 0.002, 6e6)), "cannot be seen",
        ),
    )  # fmt: skip
    cost = WidthCost("a.py:b", "bfloat16", "gloo on cpu", degrees, "tp=1: because")
    lines = render_width(cost.to_json()).splitlines()
    assert lines[0] == "what width costs a.py:b in bfloat16, on gloo on cpu"
    assert "2     4 ms       3 ms - 5 ms  -                -        -" in lines
    sizes = [line.split() for line in lines if "MB/s" in line]
    assert sizes == ["2 64 1 ms 2 2 ms 5 MB/s".split(), "2 128 2 ms 6 MB/s".split()]
    assert lines[-3:] == ["tp=2: cannot be seen", "", "tp=1: because"]
