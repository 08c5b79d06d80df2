"""Conduct, beside tests/unit/test_checks.py: where bits differ, said of the right rank."""

import math
from dataclasses import replace

import pytest
import torch

from tests.judging import evidence, trace, values
from tpcheck.conduct import rank_agreement, repeatability
from tpcheck.execution import AGAIN
from tpcheck.outputs import digest

torch.set_num_threads(1)


def disagreement(*outputs):
    traces = [replace(trace(rank, {"A": x}), outputs={"A": x}) for rank, x in enumerate(outputs)]
    return rank_agreement(replace(evidence(tp_size=len(traces)), exact=traces)).reason


def with_element(x, value, index):
    x = x.clone()
    x[index] = value
    return x


def test_rank_0_is_held_against_the_rest():
    mine, odd = values(4, 4), with_element(values(4, 4), 9.0, (3, 1))
    assert disagreement(odd, mine, mine) == (
        "A: rank 0 returned other bits than the rest, first at [3, 1]"
    )


@pytest.mark.parametrize(
    ("usual", "odd", "place"),
    [
        (0.0, -0.0, ", first at [1, 2]"),
        (math.nan, 1.0, ", first at [1, 2]"),
        (1.0, math.nan, ", first at [1, 2]"),
    ],
)
def test_the_place_is_where_the_bits_differ(usual, odd, place):
    mine = with_element(with_element(values(3, 4), math.nan, (0, 0)), usual, (1, 2))
    other = with_element(mine, odd, (1, 2))
    assert disagreement(mine, mine, other).endswith(f"than the rest{place}")


def test_another_shape_or_dtype_has_no_place():
    mine = values(3, 4)
    assert disagreement(mine, mine, mine[:2]).endswith("than the rest")
    assert disagreement(mine, mine, mine.float()).endswith("than the rest")


def test_the_place_of_what_does_not_repeat():
    before, after = values(3, 4), with_element(values(3, 4), -0.0, (2, 2))
    before = with_element(before, 0.0, (2, 2))
    outputs = {"A": before, AGAIN: after}
    one = trace(0, outputs, digests={key: digest(x) for key, x in outputs.items()})
    reason = repeatability(replace(evidence(tp_size=1), exact=[one])).reason
    assert "other bits after another input, at [2, 2]: " in reason
