"""The order that a probe reads of real Gloo, fed to simulated ranks, gives Gloo's bits.

The operands compared are none of those that the probe sent. The bits are torch's and Gloo's; NCCL
is asked by the same code and was not run: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

import probe_jobs
import pytest
import torch

from tpcheck.errors import SubjectError
from tpcheck.groups.jobs import Job
from tpcheck.groups.opening import open_ranks
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.numerics.rounding_probe import same_bits
from tpcheck.probes.sweep import MessageProbe, ProbeReport, probe_reductions
from tpcheck.subjects import make_ref

DTYPES = ("float16", "bfloat16", "float32", "float64")
SIZES = (1, 5, 64, 1003, 65536 + 3)
DIVIDES = "sum, then divide"


@pytest.fixture(scope="module", autouse=True)
def _warm_ranks() -> Iterator[None]:
    with open_ranks("gloo", 8, None):
        yield


def probed(collective: str, tp_size: int, **options: object) -> ProbeReport:
    ref = make_ref(f"probe_jobs:{collective}")
    given = {"dtypes": ("bfloat16",), "sizes": (50,), **options}
    return probe_reductions((tp_size,), backend="gloo", collective=ref, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_the_probed_order_gives_gloos_bits_on_other_operands(world: int) -> None:
    report = probe_reductions((world,), backend="gloo", dtypes=DTYPES, sizes=SIZES)
    assert report.switch_points == ()
    for one in report.messages:
        name = (one.dtype, one.count)
        assert (one.order, one.reproduced, one.repeatable) == ("read", True, True), name
        assert (one.wire, one.disagreeing_ranks) == (one.dtype, ()), name
        assert one.average is not None, name
        assert one.average[0] == DIVIDES, name
    messages = [(one.dtype, one.count) for one in report.messages]
    assert len(messages) == len(DTYPES) * len(SIZES)
    job = Job("probe_jobs:all_reduced", messages, world)
    with open_ranks("gloo", world, None) as ranks:
        (real,) = ranks.run([job])
    (simulated,) = SimulatedRanks(report.reduction()).run([job])
    assert real.failure is simulated.failure is None
    for name, actual, expected in zip(messages, simulated.replies[0], real.replies[0], strict=True):
        assert same_bits(actual, expected).all(), name


def test_another_order_or_accumulator_would_have_shown() -> None:
    """The comparison above is no tautology: Gloo's bits are not those of a tree or wide sum."""
    messages = [("bfloat16", 1003), ("float16", 1003)]
    job = Job("probe_jobs:all_reduced", messages, 4)
    with open_ranks("gloo", 4, None) as ranks:
        (real,) = ranks.run([job])
    for kind in ("tree", "wide"):
        (other,) = SimulatedRanks(kind).run([job])
        for actual, expected in zip(other.replies[0], real.replies[0], strict=True):
            assert not same_bits(actual, expected).all()


def test_gloo_rounds_at_every_hop_and_has_an_order_per_chunk() -> None:
    report = probe_reductions((4,), backend="gloo", dtypes=("bfloat16",), sizes=(1003,))
    (one,) = report.messages
    assert {chunk.accumulator for chunk in one.chunks} == {"bfloat16"}
    assert [chunk.tree for chunk in one.chunks] == [
        (((2, 3), 1), 0),
        (((0, 3), 2), 1),
        (((0, 1), 3), 2),
        (((1, 2), 0), 3),
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_users_collective_is_read_as_what_it_is(dtype: str) -> None:
    (one,) = probed("in_rank_order", 4, dtypes=(dtype,)).messages
    assert [(chunk.tree, chunk.accumulator) for chunk in one.chunks] == [
        ((((0, 1), 2), 3), "float32")
    ]
    assert (one.reproduced, one.average) == (True, None)


def test_a_collective_may_return_one_buffer_again_and_again() -> None:
    one = only(probed("one_buffer", 4))
    assert (one.order, one.reproduced) == ("read", True)


def test_a_float16_wire_under_bfloat16_is_named() -> None:
    (one,) = probed("half_wire", 3).messages
    assert (one.wire, one.chunks[0].accumulator, one.reproduced) == ("float16", "float16", True)


def test_the_size_at_which_the_reduction_switches_is_found_exactly() -> None:
    report = probed("by_size", 3, sizes=(1, 64, 1024, 4096))
    (switch,) = report.switch_points
    last = probe_jobs.LAST_IN_RANK_ORDER
    assert (switch.last, switch.first) == (last, last + 1)
    assert switch.change == "accumulator float32 -> bfloat16"


def test_ranks_with_other_bits_are_named() -> None:
    one = only(probed("rank_1_differs", 4, sizes=(1003,)))
    assert (one.disagreeing_ranks, one.repeatable) == ((1,), True)


def test_other_bits_in_another_call_are_said() -> None:
    one = only(probed("other_bits_at_times", 4, sizes=(1003,)))
    assert not one.repeatable


def only(report: ProbeReport) -> MessageProbe:
    (one,) = report.messages
    return one


@pytest.mark.parametrize(
    ("collective", "message"),
    [
        ("mean", "probe_jobs:mean: ones on 3 ranks became 1 at element 0, but should be their sum"),
        ("in_place", "probe_jobs:in_place: returned NoneType, but should return a tensor"),
        ("raises", "probe_jobs:raises: every rank raised ValueError: no link"),
    ],
)
def test_a_collective_that_sums_nothing_is_an_error(collective: str, message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        probed(collective, 3)


def test_random_operands_differ_between_ranks() -> None:
    """A seed that torch cuts to 32 bits once gave every rank the same: no order shows in that."""
    from tpcheck.probes.probing import random_operand

    first, second = (random_operand(rank, 100, torch.float32) for rank in (0, 1))
    assert not same_bits(first, second).any()
