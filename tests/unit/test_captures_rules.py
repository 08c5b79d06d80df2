"""Tolerance files and shard maps: what they mean, and that nothing in them is ever guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tpcheck
from tpcheck.captures.layouts import settle
from tpcheck.captures.shard_map import read_shard_map
from tpcheck.captures.tolerances import read_tolerances
from tpcheck.errors import TPCheckError

ALL = {"match": ".*", "bits": True}


def tolerances(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"tolerance": list(rules)}


def one_shard(**entry: Any) -> dict[str, Any]:
    return {"shard": [{"match": "w", **entry}]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"holds no \[\[tolerance\]\]"),
        ({"tolerance": []}, r"holds no \[\[tolerance\]\]"),
        ({"tolerance": [1]}, r"tolerance\[0\]=1, but should be a table"),
        ({"tolerances": [ALL]}, "'tolerances' is unknown"),
        (tolerances({"match": "a", "atol": 1}), "has no catch-all, but should end with one"),
        (tolerances({"match": "(?s).*", "atol": 1}), "has no catch-all"),
        (tolerances({"match": ".*"}), "limits nothing"),
        (tolerances({"atol": 1}), "match is missing"),
        (tolerances({"match": "(", "atol": 1}), r"match='\(', but should be a regular expression"),
        (tolerances({"match": 3, "atol": 1}), "match=3, but should be a regular expression"),
        (tolerances({"match": ".*", "tol": 1}), "tol is unknown, but should be one of match, atol"),
        (tolerances({"match": ".*", "atol": -1}), "atol=-1, but should be a finite number >= 0"),
        (tolerances({"match": ".*", "atol": True}), "atol=True, but should be a finite number"),
        (tolerances({"match": ".*", "rtol": float("nan")}), "rtol=nan"),
        (tolerances({"match": ".*", "max_ulp": float("inf")}), "max_ulp=inf"),
        (tolerances({"match": ".*", "bits": 1}), "bits=1, but should be true or false"),
        (tolerances({"match": ".*", "bits": True, "atol": 1}), "cannot be combined"),
    ],
)
def test_a_tolerance_file_that_is_not_plain_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TPCheckError, match=message):
        read_tolerances(value)


@pytest.mark.parametrize("text", ["[[tolerance]\n", "\x00", "a = 1\na = 2"])
def test_what_is_no_toml_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(text)
    for option in ("tolerance", "shard_map"):
        with pytest.raises(TPCheckError, match=r"t\.toml: is not TOML"):
            tpcheck.diff({}, {}, **{option: tmp_path / "t.toml"})  # type: ignore[arg-type]
        with pytest.raises(TPCheckError, match="cannot be read: No such file"):
            tpcheck.diff({}, {}, **{option: tmp_path / "none.toml"})  # type: ignore[arg-type]


def test_the_first_rule_that_matches_the_whole_name_counts() -> None:
    one = {name: torch.ones(4) for name in ("mlp.up", "mlp.up.bias", "head")}
    other = {name: value + 0.5 for name, value in one.items()}
    rules = tolerances(
        {"match": r"mlp\.up", "atol": 0.5},
        {"match": r"mlp.*", "atol": 0.1},
        {"match": ".*", "atol": 0.2},
        {"match": "head", "atol": 1.0},
    )
    report = tpcheck.diff(one, other, tolerance=rules)
    found = {v.case_id: (v.outcome, v.checks["allclose"].facts["source"]) for v in report.verdicts}
    assert found == {
        "mlp.up": ("PASS", "tolerances: tolerance[0]"),
        "mlp.up.bias": ("DRIFT", "tolerances: tolerance[1]"),
        "head": ("DRIFT", "tolerances: tolerance[2]"),
    }
    assert report.notes[:-1] == (
        "tolerances: tolerance[3] ('head') can never be used: it stands behind the catch-all",
    )


def test_rules_that_no_tensor_uses_are_reported() -> None:
    both = {"w": torch.ones(4)}
    rules = tolerances({"match": "ww", "atol": 1}, {"match": ".*", "atol": 1})
    shards = {"shard": [{"match": "v", "layout": "replicated"}]}
    report = tpcheck.diff(both, both, tolerance=rules, shard_map=shards)
    assert report.outcome == "PASS"
    assert report.notes == (
        "shard map: shard[0] ('v') is used by no tensor",
        "tolerances: tolerance[0] ('ww') is used by no tensor",
    )


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        ({"atol": 0.5}, "PASS"),
        ({"atol": 0.49}, "DRIFT"),
        ({"rtol": 0.25}, "PASS"),
        ({"rtol": 0.1, "atol": 0.31}, "PASS"),
        ({"rtol": 0.1, "atol": 0.29}, "DRIFT"),
        ({"max_ulp": 2.0**21}, "PASS"),  # 0.5 at 2.0: the spacing of float32 is 2^-22
        ({"max_ulp": 2.0**21 - 1}, "DRIFT"),
        ({"max_ulp": 2.0**20, "atol": 0.25}, "PASS"),
        ({"relative_rms": 0.126}, "PASS"),
        ({"relative_rms": 0.124}, "DRIFT"),
        ({"relative_rms": 0.124, "atol": 1}, "DRIFT"),
        ({"bits": True}, "DRIFT"),
    ],
)
def test_an_element_may_be_off_by_the_sum_of_what_is_allowed(limits: Any, outcome: str) -> None:
    expected = torch.full((4,), 2.0)
    actual = expected + torch.tensor([0.5, 0, 0, 0])
    rules = tolerances({"match": ".*", **limits})
    report = tpcheck.diff({"w": expected}, {"w": actual}, tolerance=rules)
    assert report.outcome == outcome


def test_numbers_of_the_command_line_and_a_file_do_not_mix() -> None:
    for options in ({"atol": 1.0}, {"rtol": 1.0}, {"oracle": {}}):
        with pytest.raises(TPCheckError, match="cannot be combined"):
            tpcheck.diff({}, {}, tolerance=tolerances(ALL), **options)  # type: ignore[arg-type]
    with pytest.raises(TPCheckError, match="atol=-1"):
        tpcheck.diff({}, {}, atol=-1.0)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "layout=None, but should be one of replicated, concat, stack, partial-sum"),
        ({"layout": "shard"}, "layout='shard'"),
        ({"layout": "concat"}, "dim is missing"),
        ({"layout": "concat", "dim": True}, "dim=True"),
        ({"layout": "concat", "dim": "h"}, r"dim='h', but should stand once in dims=\[\]"),
        ({"layout": "concat", "dim": "h", "dims": ["h", "h"]}, "should stand once"),
        ({"layout": "concat", "dim": 0, "dims": []}, "dims=.., but should be a list of names"),
        ({"layout": "concat", "dim": 0, "size": [1]}, "size is unknown"),
        ({"layout": "concat", "dim": 0, "sizes": [-1]}, "sizes=.-1., but should be a list"),
        ({"layout": "concat", "dim": 0, "sizes": [[1], [2]]}, "has 2 lists, but should have 1"),
        ({"layout": "concat", "dim": 0, "segments": [2, 0]}, "segments=.2, 0., but should be"),
        ({"layout": "concat", "dim": 0, "segments": [2, 2], "sizes": [1, 1]}, "list per segment"),
        ({"layout": "concat", "dim": 0, "copies": 0}, "copies=.0., but should be a list"),
        ({"layout": "concat", "dim": 0, "copies": [1, 2]}, "or a list of one per segment"),
        ({"layout": "concat", "dim": 0, "padding": 1}, "padding=1, but should be true or false"),
        ({"layout": "concat", "dim": 0, "ranks": [0, 0]}, "should name each rank once"),
        ({"layout": "concat", "dim": 0, "ranks": [10**9]}, "should name each rank once"),
        ({"layout": "replicated", "dim": 0}, "dim means nothing where layout='replicated'"),
        ({"layout": "stack", "sizes": [1]}, "sizes means nothing where layout='stack'"),
    ],
)
def test_a_shard_map_that_is_not_plain_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(TPCheckError, match=message):
        read_shard_map(one_shard(**entry))


@pytest.mark.parametrize(
    ("entry", "shape", "shapes", "text"),
    [
        ({"dim": 2}, (4, 2), [(2, 2)] * 2, "dim=2 in the shard map, but should be a dim of shape"),
        ({"dim": "a", "dims": ["a"]}, (4, 2), [(2, 2)] * 2, "dims=['a'] in the shard map, but the"),
        ({"dim": 0}, (5, 2), [(2, 2)] * 2, "the ranks hold 4 in all, but should hold 5 [dim 0]"),
        ({"dim": 0}, (4, 2), [(2, 2), (2, 3)], "rank 1: shape=[2, 3], but should be [4, 2]"),
        ({"dim": 0, "sizes": [1, 2]}, (4, 2), [(2, 2)] * 2, "sizes=[1, 2] are 2 pieces of 3"),
        ({"dim": 0, "sizes": [1, 3]}, (4, 2), [(2, 2)] * 2, "rank 0: holds 2 of dim 0, but should"),
        ({"dim": 0, "copies": 3}, (4, 2), [(2, 2)] * 2, "2 ranks do not divide into groups of"),
        ({"dim": 0, "segments": [3, 2]}, (4, 2), [(2, 2)] * 2, "segments=[3, 2] sum to 5, but"),
        ({"dim": 0, "segments": [2, 2]}, (4, 2), [(1, 2), (3, 2)], "there is no way to split"),
        ({"dim": 0, "segments": [5, 5]}, (10, 1), [(4, 1), (4, 1), (2, 1)], ""),
        ({"dim": 0, "ranks": [0, 5]}, (4, 2), [(2, 2)] * 2, "rank 5 recorded no such tensor"),
        ({"dim": 0, "ranks": [0]}, (2, 2), [(2, 2)] * 2, "rank 1 recorded it too, but the shard"),
    ],
)
def test_what_a_map_says_is_held_against_every_shape(
    entry: Any, shape: Any, shapes: Any, text: str
) -> None:
    (rule,) = read_shard_map(one_shard(layout="concat", **entry))
    found = settle(rule, shape, dict(enumerate(shapes)), range(len(shapes)))
    assert text in "\n".join(found.problems)
    assert bool(found.problems) == bool(text)


def test_segments_that_split_in_more_than_one_way_ask_for_sizes() -> None:
    # 4 rows on 3 ranks are 2, 2, 0 or 2, 1, 1; 3 rows are 1, 1, 1 either way
    (rule,) = read_shard_map(one_shard(layout="concat", dim=0, segments=[4, 3], padding=True))
    found = settle(rule, (7,), dict.fromkeys(range(3), (3,)), range(3))
    assert found.problems[0].startswith("there is more than one way to split segments=[4, 3]")


def test_logits_of_one_rank_alone_are_said_with_ranks() -> None:
    one = torch.ones(3)
    shards = one_shard(layout="replicated", ranks=[0])
    assert tpcheck.diff({"w": one}, [{"w": one}, {}], shard_map=shards).outcome == "PASS"
    assert tpcheck.diff({"w": one}, [{"w": one}, {}]).outcome == "WRONG"


def test_a_vocabulary_padded_at_its_end_is_compared_without_the_pads() -> None:
    whole = torch.arange(10.0).reshape(5, 2)
    padded = torch.cat([whole, torch.full((1, 2), 7.0)])
    ranks = [{"w": part.clone()} for part in padded.split(2)]
    shards = one_shard(layout="concat", dim=0, padding=True)
    assert tpcheck.diff({"w": whole}, ranks, shard_map=shards).outcome == "PASS"
    ranks[2]["w"][0] += 1
    off = tpcheck.diff({"w": whole}, ranks, shard_map=shards).verdicts[0]
    assert off.checks["allclose"].facts["ranks"] == [2]
    assert off.first_divergence is not None
    assert off.first_divergence.index == "[4, 0:2]"
