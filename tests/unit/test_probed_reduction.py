"""A probed reduction sums as what it was read from, takes no message it has not seen, and travels.

Simulated ranks of a known kind are probed here; tests/real/test_probe_gloo.py probes Gloo.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from tpcheck.errors import BackendError, TPCheckError
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.numerics.probed_reduction import ProbedReduction
from tpcheck.numerics.reduction import reduce, reduce_sum
from tpcheck.numerics.rounding_probe import same_bits
from tpcheck.probes.json_form import from_json, to_json
from tpcheck.probes.sweep import ProbeReport, probe_reductions


@pytest.fixture(scope="module")
def report() -> ProbeReport:
    return probe_reductions((3, 4), backend="sim", sizes=(6, 35))


def draw(world: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(world)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("world", [3, 4])
def test_it_sums_as_what_was_probed(report: ProbeReport, world: int, dtype: torch.dtype) -> None:
    probed = report.reduction()
    for shape in ((6,), (2, 3), (5, 7)):
        tensors = draw(world, shape, dtype)
        for op in ("sum", "avg", "max"):
            expected = reduce(tensors, op, "ring")
            actual = reduce(tensors, op, probed)
            assert actual.shape == expected.shape
            assert same_bits(actual, expected).all()
    assert not same_bits(reduce_sum(tensors, "wide"), expected).all()


def test_integers_and_a_single_rank_need_no_order(report: ProbeReport) -> None:
    probed = report.reduction()
    ints = [torch.tensor([200, 7, rank], dtype=torch.uint8) for rank in range(5)]
    assert reduce_sum(ints, probed).tolist() == [1000 % 256, 35, 10]
    (one,) = draw(1, (9,), torch.bfloat16)
    assert same_bits(reduce_sum([one], probed), one).all()
    assert reduce_sum([torch.empty(0)] * 3, probed).shape == (0,)


def test_a_message_that_was_not_probed_is_refused(report: ProbeReport) -> None:
    probed = report.reduction()
    with pytest.raises(ValueError, match=r"7 elements of bfloat16 at 3 ranks .* there: 6, 35"):
        reduce_sum(draw(3, (7,), torch.bfloat16), probed)
    with pytest.raises(ValueError, match=r"6 elements of float64 at 3 ranks .* there: nothing"):
        reduce_sum(draw(3, (6,), torch.float64), probed)


def test_simulated_ranks_take_it_and_no_unknown_name(report: ProbeReport) -> None:
    assert isinstance(SimulatedRanks(report.reduction()).reduction, ProbedReduction)
    with pytest.raises(BackendError, match="reduction='nonsense', but should be one of ring"):
        SimulatedRanks("nonsense")


def test_a_report_survives_json(report: ProbeReport) -> None:
    value = json.loads(json.dumps(to_json(report), allow_nan=False))
    assert from_json(value) == report
    assert from_json(value).reduction() == report.reduction()


def _set(value: Any, path: tuple[Any, ...], to: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = to


FIRST = ("messages", 0)
CHUNK = (*FIRST, "chunks", 0)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("schema",), "tpcheck.report/1", "probe.schema='tpcheck.report/1', but should be one of"),
        (("messages",), {}, r"probe.messages=\{\}, but should be a list"),
        ((*FIRST, "tp_size"), 1, r"messages\[0\].tp_size=1, but should be at least 2"),
        ((*FIRST, "tp_size"), True, r"messages\[0\].tp_size=True, but should be a whole number"),
        ((*FIRST, "dtype"), "int8", r"messages\[0\].dtype='int8', but should be one of"),
        ((*FIRST, "wire"), "__class__", r"messages\[0\].wire='__class__', but should be one of"),
        ((*FIRST, "count"), 7, r"messages\[0\].chunks=.*, but should be chunks from 0 to 7"),
        ((*FIRST, "order"), "unreadable", r"messages\[0\].chunks=.*, but should be \[\]"),
        ((*FIRST, "chunks"), [], r"messages\[0\].chunks=\[\], but should be chunks from 0 to 6"),
        ((*CHUNK, "start"), 1, "chunks from 0 to 6 without a gap"),
        ((*CHUNK, "order"), [0, 1], r"chunks\[0\].order=\[0, 1\], but should be nested lists with"),
        ((*CHUNK, "order"), [[0, 1], 1], "each rank below 3 once"),
        ((*CHUNK, "order"), [[0, 1], "2"], "each rank below 3 once"),
        ((*CHUNK, "order"), [[0, 1], [2]], "each rank below 3 once"),
        ((*CHUNK, "order"), "__import__", "each rank below 3 once"),
        ((*CHUNK, "accumulator"), "load", r"accumulator='load', but should be any, float16"),
    ],
)
def test_a_report_that_cannot_be_is_refused_by_its_path(
    report: ProbeReport, path: tuple[Any, ...], to: Any, message: str
) -> None:
    value = json.loads(json.dumps(to_json(report)))
    _set(value, path, to)
    with pytest.raises(TPCheckError, match=message):
        from_json(value)
