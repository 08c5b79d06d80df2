"""Sums over ranks carried in another dtype: the right bits, and what went by."""

from __future__ import annotations

import math

import pytest
import torch

from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.reduction import reduce_sum
from tpcheck.observation.wire import PLAIN_WIRES, Wire, wires_for

COUNT = 600


def call(world, body):
    return body(world)


def on_ranks(body, size):
    (result,) = SimulatedRanks("ring").run([Job(f"{__name__}:call", body, size, 60.0)])
    assert result.failure is None, result.failure
    return result.replies


def terms(size, scale=1.0):
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(COUNT, generator=draw) * scale).bfloat16() for _ in range(size)]


def carried(partials, wire, op=lambda tp, x: tp.all_reduce(x)):
    def body(world):
        tp = world.group(seed=0, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
        tp.interceptor = Wire(wire)
        return op(tp, partials[world.rank]), tp.interceptor.seen

    return on_ranks(body, len(partials))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("wire", PLAIN_WIRES)
def test_a_plain_wire_is_cast_there_reduced_and_cast_back(wire, size):
    partials = terms(size)
    cast = [x.to(getattr(torch, wire)) for x in partials]
    expected = reduce_sum(cast, "ring").to(torch.bfloat16)
    for result, _ in carried(partials, wire):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("wire", [kind for kind in LOW_PRECISION if kind != "fp16_wire"])
def test_a_low_precision_wire_is_the_emulated_one(wire):
    partials = terms(4)
    expected = reduce_sum(partials, wire)
    assert not torch.equal(expected, reduce_sum(partials, "ring"))
    for result, _ in carried(partials, wire):
        assert torch.equal(result, expected)


def test_no_wire_leaves_the_sum_as_it_is():
    partials = terms(4)
    expected = reduce_sum(partials, "ring")
    assert all(torch.equal(result, expected) for result, _ in carried(partials, ""))


@pytest.mark.parametrize("wire", ["float32", "int8_wire"])
def test_a_scattered_sum_is_a_piece_of_the_whole_one(wire):
    partials = terms(4)
    pieces = carried(partials, wire, lambda tp, x: tp.reduce_scatter(x, 0))
    whole = carried(partials, wire)[0][0]
    pieces = torch.cat([piece for piece, _ in pieces])
    # the simulated ring sums a scattered chunk in the same order
    assert pieces.shape == whole.shape
    torch.testing.assert_close(pieces.float(), whole.float(), rtol=2**-8, atol=0)


def test_an_average_over_a_low_precision_wire_is_its_sum_divided():
    partials = terms(4)
    mean = carried(partials, "int8_wire", lambda tp, x: tp.all_reduce(x, "avg"))[0][0]
    assert torch.equal(mean, reduce_sum(partials, "int8_wire") / 4)


@pytest.mark.parametrize(
    "op",
    [
        lambda tp, x: tp.all_reduce(x, "max"),
        lambda tp, x: tp.all_gather(x, 0),
        lambda tp, x: tp.all_reduce((x * 9).long()),
    ],
)
def test_what_is_no_sum_of_floats_is_left_alone(op):
    plain, cast = carried(terms(3), "", op), carried(terms(3), "float16", op)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain, cast, strict=True))
    assert all(seen.sums == 0 for _, seen in cast)


def test_one_rank_sums_nothing():
    (result, seen), *_ = carried(terms(1), "float16")
    assert torch.equal(result, terms(1)[0])
    assert seen.sums == 0


def test_each_rank_sees_its_own_largest_partial_and_the_sum():
    partials = terms(3)
    partials[1][7] = 96.0
    replies = carried(partials, "")
    total = reduce_sum(partials, "ring")
    for rank, (_, seen) in enumerate(replies):
        assert seen.largest_partial == float(partials[rank].abs().max())
        assert seen.largest_sum == float(total.abs().max())
        assert seen.dtypes == {"bfloat16": 1}
    assert replies[1][1].largest_partial == 96.0


def test_float16_overflows_where_bfloat16_does_not():
    partials = terms(2, scale=3e5)
    for result, seen in carried(partials, "float16"):
        assert seen.overflowed == int((~result.isfinite()).sum()) > 0
        assert math.isfinite(seen.largest_partial)
        assert seen.largest_partial > 65504
    for result, seen in carried(partials, "bfloat16"):
        assert bool(result.isfinite().all())
        assert seen.overflowed == 0


def test_the_dtypes_own_wire_is_tried_first_and_none_twice():
    assert wires_for("bfloat16")[:3] == ("bfloat16", "float32", "float16")
    assert wires_for("float32") == ("float32", "float16", "bfloat16", "fp8_wire")
    for dtype in PLAIN_WIRES:
        assert len(set(wires_for(dtype))) == len(wires_for(dtype))


def test_an_unknown_wire_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"wire='fp7', but should be one of float32, float16"):
        Wire("fp7")
