"""What plots show: cases pooled as they should be, and bounds that say so."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.drift_reports import entry, profile, report_of, usual
from tpcheck.render.drift_content import drift_content
from tpcheck.render.drift_series import (
    MAX_LAYERS,
    RankZ,
    at_most,
    depths,
    pooled_layers,
    rank_distances,
    ulp_counts,
    why_none,
)

OWN = entry("bfloat16", 1.5, deployed=True)


def two_cases(**second: Any) -> Any:
    first, other = profile(OWN, z=3.0), profile(OWN, z=-9.0)
    other["depth"]["points"] = [
        {**point, "tp1_epsilons": 3.0, "epsilons": 4.0, "ratio": 4 / 3}
        for point in other["depth"]["points"]
    ]
    return drift_content(
        report_of((4, "bfloat16", "PASS", first), (4, "bfloat16", "PASS", other | second))
    )


def test_errors_of_cases_are_pooled_by_their_squares() -> None:
    found = depths(two_cases())["bfloat16", 4]
    assert found.layers == ("layers.0", "layers.1")
    assert found.tp1 == pytest.approx((math.sqrt(5), math.sqrt(6.5)))
    assert found.tpn[0] == pytest.approx(math.sqrt((1.2**2 + 16) / 2))
    assert found.ratios()[0] == pytest.approx(found.tpn[0] / math.sqrt(5))


def test_counts_of_cases_are_added() -> None:
    assert ulp_counts(two_cases())["bfloat16", 4] == {0: 100, 1: 60, 2: 38, 4: 2}


def test_of_cases_the_rank_that_is_furthest_is_shown_with_its_sign() -> None:
    found = rank_distances(two_cases())["bfloat16", 4]
    assert found.worst() == (-9.0, "layers.1.mlp.down_proj", 3)
    assert found.z[0] == (0.25,) * 4


def test_generated_cases_may_have_other_layers() -> None:
    longer = profile(OWN, layers=("layers.0", "layers.1", "layers.2"))
    content = drift_content(
        report_of((4, "bfloat16", "PASS", profile(OWN)), (4, "bfloat16", "PASS", longer))
    )
    assert depths(content)["bfloat16", 4].layers == ("layers.0", "layers.1", "layers.2")
    assert len(rank_distances(content)["bfloat16", 4].layers) == 3


def test_an_error_that_is_not_known_is_a_gap() -> None:
    held = profile(OWN)
    held["depth"]["points"][0] |= {"tp1_epsilons": None, "ratio": None}
    found = depths(drift_content(report_of((4, "bfloat16", "PASS", held))))["bfloat16", 4]
    assert found.tp1[0] is None
    assert found.ratios()[0] is None


@pytest.mark.parametrize(("share", "edge"), [(0.5, 0), (0.51, 1), (0.99, 2), (1.0, 4)])
def test_a_share_of_outputs_is_within_its_edge(share: float, edge: int) -> None:
    assert at_most({0: 50, 1: 30, 2: 19, 4: 1}, share) == edge


def test_many_layers_share_rows_and_none_of_the_furthest_is_lost() -> None:
    for count in (MAX_LAYERS, MAX_LAYERS + 1, 161, 2000):
        rows = tuple((0.5, -float(i == count - 2) * 12) for i in range(count))
        found = pooled_layers(RankZ(tuple(f"layers.{i}" for i in range(count)), rows))
        assert len(found.layers) <= MAX_LAYERS
        assert found.worst()[0] == -12
        assert found.worst()[2] == 1
        assert (found.layers[0] == "layers.0") == (count == MAX_LAYERS)


def test_the_reason_is_that_of_the_profiles() -> None:
    none = drift_content(report_of((2, "bfloat16", "WRONG", None)))
    assert why_none(none, "rows", "otherwise").startswith("not the same function")
    silent = profile(OWN) | {"rows": None, "rows_reason": "no layer declares its placements"}
    content = drift_content(report_of((4, "bfloat16", "PASS", silent)))
    assert why_none(content, "rows", "otherwise") == "no layer declares its placements"
    assert why_none(drift_content(usual()), "rows", "otherwise") == "otherwise"
