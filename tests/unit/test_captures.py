"""`tpcheck.diff`: whatever way a tensor is cut, the cut alone is no finding; a fault in it is, and
the right rank is named.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tpcheck
from tests.models import SMALL
from tests.reference_jobs import Run, ids_for, on_ranks
from tpcheck.captures import measuring
from tpcheck.captures.comparing import exit_code
from tpcheck.captures.layouts import whole_tensors
from tpcheck.captures.measuring import blocks, measure, merged
from tpcheck.captures.tensors import HeldTensor
from tpcheck.captures.tolerances import Limit
from tpcheck.comparison import compare
from tpcheck.hf.config import spec_from_config
from tpcheck.records import Report, Verdict
from tpcheck.render.diff import render_diff
from tpcheck.report import from_json, to_json

DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "uint8", "float8_e4m3fn", "bool")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a test are cut into many blocks, as large ones are."""
    torch.set_num_threads(1)
    monkeypatch.setattr(measuring, "BLOCK", 16)
    monkeypatch.setattr("tpcheck.captures.attribution.BLOCK", 16)
    monkeypatch.setattr("tpcheck.captures.judging.BLOCK", 16)


def check(expected: Any, actual: Any, **options: Any) -> Report:
    """Run diff, and hold the report to what every reader of reports does."""
    lines: list[Verdict] = []
    report = tpcheck.diff(expected, actual, on_tensor=lines.append, **options)
    read = from_json(json.loads(json.dumps(to_json(report), allow_nan=False)))
    assert [one.outcome for one in read.verdicts] == [one.outcome for one in report.verdicts]
    assert report.path.backend == "capture"
    assert not report.path.same_as_deployed
    assert exit_code(report) == (0 if report.outcome == "PASS" else 1)
    assert lines == list(report.verdicts)[: len(lines)]
    return report


def only(report: Report) -> Verdict:
    (verdict,) = report.verdicts
    return verdict


def values(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Draw values without a zero or two that are equal next to each other, where they fit."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    if dtype in ("int32", "uint8"):
        return (drawn.abs() * 20).to(getattr(torch, dtype))
    return (drawn > 0) if dtype == "bool" else drawn.to(getattr(torch, dtype))


class Cut:
    """A tensor, the ranks' parts of it, and the map that says so; the map may be needed or not."""

    def __init__(self, whole: torch.Tensor, parts: list[torch.Tensor], rule: dict[str, Any]):
        self.whole, self.parts, self.rule = whole, parts, {"match": "w", **rule}

    def diff(self, parts: list[torch.Tensor] | None = None, **options: Any) -> Report:
        parts = self.parts if parts is None else parts
        ranks = [{"w": part} for part in parts]
        return check({"w": self.whole}, ranks, shard_map={"shard": [self.rule]}, **options)


@st.composite
def cuts(draw: st.DrawFn, layouts: tuple[str, ...] = ("replicated", "concat", "stack")) -> Cut:
    ranks = draw(st.integers(2, 5))
    layout = draw(st.sampled_from(layouts))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(shape) - 1))
    if layout == "replicated":
        whole = values(tuple(shape), dtype, seed)
        return Cut(whole, [whole.clone() for _ in range(ranks)], {"layout": layout})
    named = {"dims": [f"d{i}" for i in range(len(shape))], "dim": f"d{dim}"}
    rule: dict[str, Any] = {"layout": layout, **draw(st.sampled_from([{"dim": dim}, named]))}
    order = list(draw(st.permutations(range(ranks))))
    if order != sorted(order):
        rule["ranks"] = order
    if layout == "stack":
        shape[dim] = ranks
        whole = values(tuple(shape), dtype, seed)
        parts = [whole.select(dim, order.index(rank)).clone() for rank in range(ranks)]
        return Cut(whole, parts, rule)
    segments = draw(
        st.lists(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks), max_size=3)
    )
    segments = [one for one in segments if sum(one)] or [[1] * ranks]
    if len(segments) > 1:
        rule |= {"segments": [sum(one) for one in segments], "sizes": segments}
    shape[dim] = sum(map(sum, segments))
    whole = values(tuple(shape), dtype, seed)
    held = [
        one.split(sizes, dim)
        for one, sizes in zip(
            whole.split([sum(one) for one in segments], dim), segments, strict=True
        )
    ]
    parts = [torch.cat([one[order.index(rank)] for one in held], dim) for rank in range(ranks)]
    if draw(st.booleans()):
        rule["padding"] = True
        rule["sizes"] = segments if len(segments) > 1 else segments[0]
        pad = torch.ones_like(parts[0].narrow(dim, 0, 1)) if parts[0].shape[dim] else None
        parts[0] = parts[0] if pad is None else torch.cat([parts[0], pad], dim)
    return Cut(whole, parts, rule)


@settings(max_examples=60)
@given(cuts())
def test_a_cut_alone_is_no_finding(cut: Cut) -> None:
    report = cut.diff()
    assert report.outcome == "PASS", only(report).reasons
    facts = only(report).checks["allclose"].facts
    assert facts["required_atol"] == 0
    # every element of the logical tensor was compared, at least once
    assert facts["count"] >= cut.whole.numel()


def flip(part: torch.Tensor, at: int) -> torch.Tensor:
    """Return a copy with the lowest bit of one element flipped."""
    raw = torch.empty(part.numel(), dtype=part.dtype).copy_(part.reshape(-1)).view(torch.uint8)
    raw[at * part.element_size()] ^= 1
    return raw.view(part.dtype).reshape(part.shape)


@settings(max_examples=60)
@given(cuts(), st.data())
def test_one_flipped_bit_is_found_on_its_rank_and_at_its_index(
    cut: Cut, data: st.DataObject
) -> None:
    rule = cut.rule
    assume(not rule.get("padding"))
    rank = data.draw(st.sampled_from([r for r, part in enumerate(cut.parts) if part.numel()]))
    at = data.draw(st.integers(0, cut.parts[rank].numel() - 1))
    marked = [torch.zeros_like(part, dtype=torch.bool) for part in cut.parts]
    marked[rank].view(-1)[at] = True
    parts = list(cut.parts)
    parts[rank] = flip(parts[rank], at)
    verdict = only(cut.diff(parts))
    first = verdict.first_divergence
    assert verdict.outcome != "PASS"
    assert first is not None
    assert verdict.checks["allclose"].facts["ranks"] == [rank]
    assert first.rank == rank
    assert verdict.checks["allclose"].facts["mismatches"] == 1
    index = tuple(verdict.checks["allclose"].facts["index"])
    assert first.index == f"[{', '.join(map(str, index))}]"
    # what stands at that index of the logical tensor is what the rank held before
    assert cut.whole[index].item() == pytest.approx(
        cut.parts[rank].reshape(-1)[at].item(), nan_ok=True
    )
    if rule["layout"] == "replicated":
        assert verdict.checks["rank_agreement"].facts["ranks"] == [rank]


@settings(max_examples=40)
@given(cuts(("concat", "stack")), st.data())
def test_two_swapped_ranks_are_named(cut: Cut, data: st.DataObject) -> None:
    ranks = list(range(len(cut.parts)))
    one, other = data.draw(st.permutations(ranks))[:2]
    parts = list(cut.parts)
    assume(parts[one].shape == parts[other].shape and "padding" not in cut.rule)
    distinct = {str(part.double().tolist()) for part in parts}
    assume(len(distinct) == len(parts))  # else a piece fits in more than one place
    parts[one], parts[other] = parts[other], parts[one]
    verdict = only(cut.diff(parts))
    assert verdict.outcome != "PASS"
    assert set(verdict.checks["allclose"].facts["ranks"]) == {one, other}
    sizes = cut.rule.get("sizes")
    if sizes is None:
        detail = verdict.first_divergence.detail  # type: ignore[union-attr]
        assert f"rank {one} holds rank {other}'s piece" in detail
        assert f"rank {other} holds rank {one}'s piece" in detail


@settings(max_examples=20)
@given(cuts(), st.data())
def test_a_rank_that_recorded_nothing_is_named(cut: Cut, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(cut.parts) - 1))
    ranks: list[dict[str, torch.Tensor]] = [{"w": part} for part in cut.parts]
    ranks[rank] = {}
    verdict = only(check({"w": cut.whole}, ranks, shard_map={"shard": [cut.rule]}))
    assert verdict.outcome == "WRONG"
    assert f"rank {rank} recorded no such tensor" in verdict.checks["tiling"].reason
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.rank == rank


@settings(max_examples=30)
@given(
    st.integers(2, 6),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.integers(0, 99),
    st.booleans(),
)
def test_terms_of_a_sum_are_summed_in_float64(
    ranks: int, dtype: str, seed: int, said: bool
) -> None:
    terms = [values((5, 7), dtype, seed + i) for i in range(ranks)]
    whole = torch.stack([term.double() for term in terms]).sum(0).to(terms[0].dtype)
    rule = {"shard": [{"match": "w", "layout": "partial-sum"}]} if said else None
    verdict = only(check({"w": whole}, [{"w": term} for term in terms], shard_map=rule))
    assert verdict.outcome == "PASS", verdict.reasons
    assert verdict.checks["tiling"].facts["layout"] == 'Partial("sum")'
    assert ("chosen" in verdict.checks["tiling"].facts["layout_source"]) is not said


@settings(max_examples=20)
@given(st.integers(2, 6), st.integers(0, 99), st.data(), st.booleans())
def test_a_scaled_term_is_found_with_rank_and_factor(
    ranks: int, seed: int, data: st.DataObject, said: bool
) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    terms = [values((40, 25), "bfloat16", seed + i) for i in range(ranks)]
    whole = torch.stack([term.double() for term in terms]).sum(0).bfloat16()
    terms[rank] = (terms[rank].double() * (1 + 2**-4)).bfloat16()
    rule = {"shard": [{"match": "w", "layout": "partial-sum"}]} if said else None
    verdict = only(check({"w": whole}, [{"w": term} for term in terms], shard_map=rule))
    assert verdict.outcome == "DRIFT"
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.rank == rank
    factor = float(verdict.first_divergence.detail.split(" is ")[1].split()[0])
    assert factor == pytest.approx(1 + 2**-4, abs=2e-3)


def test_a_small_scale_is_found_in_float32_terms_too() -> None:
    terms = [values((40, 25), "float32", i) for i in range(4)]
    whole = sum(term.double() for term in terms).float()  # type: ignore[union-attr]
    terms[2] = terms[2] * (1 + 2**-6)
    verdict = only(check({"w": whole}, [{"w": term} for term in terms]))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.rank == 2
    assert "1.01562" in verdict.first_divergence.detail


def test_a_term_of_zeros_is_named() -> None:
    terms = [values((6, 5), "float32", i) for i in range(3)]
    whole = terms[0] + terms[1] + terms[2]
    terms[1] = torch.zeros_like(terms[1])
    rule = {"shard": [{"match": "w", "layout": "partial-sum"}]}
    verdict = only(check({"w": whole}, [{"w": term} for term in terms], shard_map=rule))
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.detail == "rank 1's term is all zeros"


@pytest.mark.parametrize("dim", [0, 1])
def test_a_boundary_off_by_one_is_the_rank_that_read_it(dim: int) -> None:
    whole = values((8, 8), "float32", 3)
    parts = list(whole.split(2, dim))
    parts[2] = whole.narrow(dim, 3, 2)
    verdict = only(check({"w": whole}, [{"w": part.contiguous()} for part in parts]))
    assert verdict.checks["allclose"].facts["ranks"] == [2]
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.rank == 2


def test_a_transposed_piece_is_found_whether_it_fits_or_not() -> None:
    whole = values((6, 3), "float32", 3)
    square = [{"w": whole[:3].T.contiguous()}, {"w": whole[3:].contiguous()}]
    assert only(check({"w": whole}, square)).checks["allclose"].facts["ranks"] == [0]
    wide = only(check({"w": whole}, {"w": whole.T.contiguous()}))
    assert wide.checks["capture"].reason == "shape=[3, 6], but should be [6, 3] (transposed?)"


def test_shapes_that_add_up_nowhere_ask_for_a_map() -> None:
    whole = values((6, 4), "float32", 3)
    padded = [{"w": torch.zeros(4, 4)}, {"w": torch.zeros(4, 4)}]
    verdict = only(check({"w": whole}, padded))
    assert verdict.outcome == "WRONG"
    assert verdict.checks["tiling"].reason == (
        "the ranks' shapes [4, 4], [4, 4] do not make up [6, 4] (padding along dim 0?);"
        " say how in a shard map"
    )


def test_pieces_that_neighbours_hold_twice_ask_for_copies() -> None:
    whole = values((8, 4), "float32", 3)
    kv_heads = [{"k": whole[:4]}, {"k": whole[:4]}, {"k": whole[4:]}, {"k": whole[4:]}]
    verdict = only(check({"k": whole}, kv_heads))
    assert "(copies = 2 along dim 0?); say how in a shard map" in verdict.reasons[0]


def test_copies_or_terms_is_a_tie_where_neither_is_close_and_nobody_guesses() -> None:
    whole, *others = (values((8, 4), "float32", seed) for seed in range(3))
    report = check({"w": whole}, [{"w": other} for other in others])
    assert report.outcome == "INCONCLUSIVE"
    verdict = only(report)
    assert verdict.checks["allclose"].outcome == "SKIPPED"
    assert verdict.checks["tiling"].reason.startswith("ambiguous: copies that differ, or terms of")
    rule = {"shard": [{"match": "w", "layout": "replicated"}]}
    assert check({"w": whole}, [{"w": o} for o in others], shard_map=rule).outcome == "WRONG"


def test_copies_of_kv_heads_are_compared_with_each_other() -> None:
    query, key = values((8, 3), "float32", 1), values((4, 3), "float32", 2)
    parts = [
        torch.cat([query[2 * r : 2 * r + 2], key[2 * (r // 2) : 2 * (r // 2) + 2]])
        for r in range(4)
    ]
    rule = {"match": "w", "layout": "concat", "dim": 0, "segments": [8, 4], "copies": [1, 2]}
    cut = Cut(torch.cat([query, key]), parts, rule)
    assert cut.diff().outcome == "PASS"
    parts[3] = parts[3].clone()
    parts[3][2, 0] += 1
    verdict = only(cut.diff(parts, atol=2.0))
    assert verdict.outcome == "WRONG"  # within the tolerance, but two copies differ
    assert verdict.checks["rank_agreement"].reason.startswith("rank 3: 1 element has other bits")


def test_without_a_map_equal_shapes_are_copies_and_have_equal_bits() -> None:
    whole = values((4, 4), "bfloat16", 1)
    other = flip(whole, 5)
    verdict = only(check({"w": whole}, [{"w": whole}, {"w": whole}, {"w": other}], atol=1.0))
    assert verdict.outcome == "WRONG"
    assert verdict.checks["rank_agreement"].reason == (
        "rank 2: 1 element has other bits than on rank 0"
    )


def test_nan_and_inf_are_compared_as_masks_before_any_tolerance() -> None:
    whole = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert check({"w": whole}, {"w": whole.clone()}, atol=1e9).outcome == "PASS"
    for at, other in ((0, math.nan), (1, 1.0), (2, -math.inf), (3, 0.0)):
        bad = whole.clone()
        bad[at] = other
        verdict = only(check({"w": whole}, {"w": bad}, atol=1e9, rtol=1e9))
        assert verdict.outcome == "WRONG"
        assert verdict.checks["allclose"].facts["index"] == [at]


def test_integers_are_equal_or_not_whatever_a_tolerance_says() -> None:
    big = torch.tensor([2**53, 7])
    verdict = only(check({"w": big}, {"w": big + torch.tensor([1, 0])}, atol=10.0))
    assert verdict.outcome == "WRONG"
    assert "actual=9007199254740993, but should be 9007199254740992" in verdict.reasons[0]
    assert verdict.checks["allclose"].facts["ranks"] == [0]


@pytest.mark.parametrize(
    ("whole", "bad", "advice"),
    [
        (torch.tensor([5, 7]), torch.tensor([5, 6]), "whole numbers and bools know no tolerance"),
        (torch.tensor([True]), torch.tensor([False]), "whole numbers and bools know no tolerance"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]), "no tolerance covers it"),
    ],
)
def test_where_no_tolerance_helps_none_is_advised(
    whole: torch.Tensor, bad: torch.Tensor, advice: str
) -> None:
    same = torch.ones(3)
    text = render_diff(check({"w": whole, "x": same}, {"w": bad, "x": same}))
    assert advice in text
    assert "smallest" not in text
    assert "--atol" not in text
    alike = check({"w": whole, "x": same}, {"w": whole.clone(), "x": same + 1e-3})
    assert "tolerance for all values, one of: atol=" in render_diff(alike)


def test_where_nothing_was_compared_no_tolerance_is_shown() -> None:
    text = render_diff(check({"w": torch.ones(2)}, {"v": torch.ones(2)}))
    assert "smallest" not in text
    assert text.startswith("WRONG: 2 of 2 tensors do not agree; first v: extra")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_tolerance_counts_for_complex_numbers(dtype: torch.dtype) -> None:
    whole = torch.tensor([1 + 2j, 3 + 4j], dtype=dtype)
    other = whole + torch.tensor([0, 0.5j], dtype=dtype)
    assert check({"w": whole}, {"w": other}, atol=0.5).outcome == "PASS"
    assert check({"w": whole}, {"w": other}, atol=0.4).outcome == "DRIFT"


def test_the_sign_of_zero_counts_where_bits_were_asked_for() -> None:
    zero = torch.zeros(3)
    minus = torch.tensor([0.0, -0.0, 0.0])
    verdict = only(check({"w": zero}, {"w": minus}))
    assert verdict.outcome == "DRIFT"
    assert "the sign of zero" in verdict.reasons[0]
    assert check({"w": zero}, {"w": minus}, atol=0.0).outcome == "PASS"


def test_another_dtype_is_a_finding_unless_the_rule_allows_it() -> None:
    whole = values((4, 4), "float32", 1)
    narrow = {"w": whole.bfloat16()}
    verdict = only(check({"w": whole}, narrow, rtol=1e-2))
    assert verdict.outcome == "WRONG"
    assert verdict.checks["allclose"].outcome == "PASS"  # its values are compared all the same
    rule = {"tolerance": [{"match": ".*", "rtol": 1e-2, "other_dtype": True}]}
    assert check({"w": whole}, narrow, tolerance=rule).outcome == "PASS"


@pytest.mark.parametrize("dtype", [*DTYPES, "float8_e5m2", "float8_e8m0fnu", "complex64", "uint64"])
def test_every_dtype_is_compared(dtype: str) -> None:
    if dtype == "float8_e8m0fnu":
        whole = torch.arange(100, 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    elif dtype == "complex64":
        whole = torch.complex(values((20,), "float32", 1), values((20,), "float32", 2))
    else:
        whole = values((20,), "float32", 1).abs().to(getattr(torch, dtype))
    assert check({"w": whole}, [{"w": whole[:7]}, {"w": whole[7:]}]).outcome == "PASS"
    verdict = only(check({"w": whole}, {"w": flip(whole, 3)}))
    assert verdict.outcome != "PASS"
    assert verdict.checks["allclose"].facts["index"] == [3]


def test_scalars_and_tensors_without_elements() -> None:
    both = {"s": torch.tensor(1.5), "e": torch.zeros(0, 4)}
    assert check(both, both).outcome == "PASS"
    off = check(both, {"s": torch.tensor(1.75), "e": torch.zeros(0, 3)})
    assert [one.outcome for one in off.verdicts] == ["WRONG", "DRIFT"]
    assert off.verdicts[1].checks["allclose"].facts["index"] == []
    nothing = check({"e": torch.zeros(0)}, {"e": torch.zeros(0)})
    assert nothing.outcome == "INCONCLUSIVE"
    assert exit_code(nothing) == 1
    assert check({}, {}).outcome == "INCONCLUSIVE"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_where_nothing_is_finite_nothing_was_compared(value: float) -> None:
    empty = {"x": torch.full((4,), value)}
    report = check(empty, [empty, empty], atol=1.0)
    assert report.outcome == "INCONCLUSIVE"
    assert report.notes == ("x: no element is finite, on either side",)
    mask = check({**empty, "n": torch.tensor([1])}, {**empty, "n": torch.tensor([1])})
    assert (mask.outcome, mask.notes) == ("PASS", ("x: no element is finite, on either side",))


def test_a_sum_that_nobody_declared_passes_with_a_word_on_the_missing_all_reduce() -> None:
    terms = [{"o": values((4, 4), "float32", seed)} for seed in range(2)]
    whole = {"o": terms[0]["o"] + terms[1]["o"]}
    report = check(whole, terms)
    assert report.outcome == "PASS"
    assert report.notes == (
        "o: passed as terms of a sum, because their values add up; where each rank should hold the"
        " sum, an all-reduce is missing: say replicated in a shard map",
    )
    said = {"shard": [{"match": "o", "layout": "partial-sum"}]}
    assert check(whole, terms, shard_map=said).notes == ()
    copies = {"shard": [{"match": "o", "layout": "replicated"}]}
    assert check(whole, terms, shard_map=copies).outcome == "WRONG"


def test_missing_and_extra_tensors_are_findings() -> None:
    one = torch.ones(2)
    report = check({"a": one, "b": one}, {"b": one, "c": one})
    assert [(v.case_id, v.outcome) for v in report.verdicts] == [
        ("a", "WRONG"),
        ("b", "PASS"),
        ("c", "WRONG"),
    ]
    assert report.verdicts[0].reasons == ("capture: missing: EXPECTED holds it, ACTUAL does not",)
    assert report.verdicts[2].reasons == ("capture: extra: ACTUAL holds it, EXPECTED does not",)


def test_only_the_first_tensor_in_order_is_the_first_divergence() -> None:
    one = {f"layers.{i}": torch.full((2,), float(i)) for i in (1, 2, 10)}
    other = {name: value + (name != "layers.1") for name, value in one.items()}
    report = check(one, other)
    assert [v.case_id for v in report.verdicts] == ["layers.1", "layers.2", "layers.10"]
    assert [v.case_id for v in report.verdicts if v.first_divergence] == ["layers.2"]
    turned = check(one, other, order=["layers.10", r"layers\..*", "typo"])
    assert [v.case_id for v in turned.verdicts if v.first_divergence] == ["layers.10"]
    assert turned.notes == ("order: 'typo' is the name of no tensor",)


def test_captures_of_one_degree_are_compared_rank_by_rank() -> None:
    ranks = [{"w": values((3,), "float32", i)} for i in range(3)]
    other = [dict(one) for one in ranks]
    other[1] = {"w": flip(other[1]["w"], 2)}
    report = check(ranks, other)
    assert [(v.case_id, v.outcome) for v in report.verdicts] == [
        ("w [rank 0]", "PASS"),
        ("w [rank 1]", "DRIFT"),
        ("w [rank 2]", "PASS"),
    ]
    with pytest.raises(tpcheck.TPCheckError, match="3 ranks recorded, but should be 1, or 2"):
        tpcheck.diff(ranks, ranks[:2])


def test_an_oracle_derives_the_tolerance_from_the_error_of_tp_1() -> None:
    oracle = values((64, 16), "float64", 1)
    expected = (oracle + values((64, 16), "float64", 2) * 1e-3).float()
    close = (oracle + values((64, 16), "float64", 3) * 1e-3).float()
    far = (oracle + values((64, 16), "float64", 3) * 1e-1).float()
    good = only(check({"w": expected}, {"w": close}, oracle={"w": oracle}))
    assert good.outcome == "PASS"
    assert good.checks["allclose"].facts["source"].startswith("derived: ")
    assert only(check({"w": expected}, {"w": far}, oracle={"w": oracle})).outcome == "DRIFT"
    lacking = only(check({"w": expected}, {"w": close}, oracle={}))
    assert "the oracle has no such tensor" in lacking.reasons[0]
    with pytest.raises(tpcheck.TPCheckError, match="--oracle and --atol cannot be combined"):
        tpcheck.diff({}, {}, oracle={}, atol=1.0)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9), st.sampled_from(DTYPES[:4]))
def test_numbers_by_blocks_are_those_of_the_whole(
    seed: int, rows: int, columns: int, dtype: str
) -> None:
    expected = values((rows, columns), dtype, seed)
    actual = (expected.double() * (1 + 0.01 * values((rows, columns), "float64", seed + 1))).to(
        expected.dtype
    )
    if seed % 3 == 0:
        actual[0, 0] = math.nan
    limit = Limit("test", atol=0.01, rtol=0.01)
    layout = whole_tensors((rows, columns), (0,))
    tally = merged(measure(HeldTensor(expected), {0: HeldTensor(actual)}, layout, limit).values())
    found, wanted = tally.freeze(), compare(actual, expected, rtol=0.01, atol=0.01)
    for name in ("count", "mismatches", "mask_mismatches", "required_atol"):
        assert getattr(found.comparison, name) == pytest.approx(getattr(wanted, name), abs=1e-12), (
            name
        )
    assert found.comparison.relative_rms == pytest.approx(wanted.relative_rms)
    if not wanted.mask_mismatches:
        assert found.comparison.worst_error == wanted.worst_error
        assert found.comparison.worst_ulp == wanted.worst_ulp


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(DTYPES[:3]))
def test_the_smallest_tolerances_are_just_enough(seed: int, dtype: str) -> None:
    expected = values((5, 9), dtype, seed)
    actual = (expected.double() * 1.01 + 1e-3).to(expected.dtype)
    facts = only(check({"w": expected}, {"w": actual})).checks["allclose"].facts
    for key, name in (
        ("required_atol", "atol"),
        ("required_rtol", "rtol"),
        ("required_ulp", "max_ulp"),
        ("relative_rms", "relative_rms"),
    ):
        for factor, outcome in ((1 + 1e-9, "PASS"), (1 - 1e-6, "DRIFT")):
            rule = {"tolerance": [{"match": ".*", name: facts[key] * factor}]}
            assert check({"w": expected}, {"w": actual}, tolerance=rule).outcome == outcome, name


def test_a_block_is_never_large_and_together_they_are_everything(monkeypatch: Any) -> None:
    from tpcheck.captures.layouts import settle
    from tpcheck.captures.shard_map import read_shard_map

    (rule,) = read_shard_map({"shard": [{"match": "w", "layout": "concat", "dim": 1}]})
    layout = settle(rule, (3, 50, 2), {0: (3, 20, 2), 1: (3, 30, 2)}, range(2)).layout
    assert layout is not None
    found = list(blocks(layout))
    assert max(block.rows * block.length for block in found) <= measuring.BLOCK
    assert sum(block.rows * block.length for block in found) == 300


def test_a_real_decoder_recorded_at_two_degrees_agrees_and_a_fault_is_found() -> None:
    spec = spec_from_config({"model_type": "llama", **SMALL})
    runs = {size: on_ranks(Run(spec, ids_for(spec)), size) for size in (1, 2)}
    captures = {
        size: [
            {"logits": reply.logits} | {name: point[1] for name, point in reply.points.items()}
            for reply in replies
        ]
        for size, replies in runs.items()
    }
    order = [*runs[1][0].points, "logits"]
    rules = {"tolerance": [{"match": ".*", "relative_rms": 1e-12}]}
    options: dict[str, Any] = {
        "tolerance": rules,
        "order": [name.replace(".", r"\.") for name in order],
    }
    report = check(captures[1][0], captures[2], **options)
    assert report.outcome == "PASS", [v.reasons for v in report.verdicts if v.reasons]
    chosen = {v.checks["tiling"].facts["layout"] for v in report.verdicts}
    assert chosen >= {"Replicate()", "Shard(dim=2)"}
    broken = next(name for name in order if "layers.1" in name and "o_proj" in name)
    captures[2][1][broken] = captures[2][1][broken] * 1.001
    off = check(captures[1][0], captures[2], **options)
    assert [v.case_id for v in off.verdicts if v.outcome != "PASS"] == [broken]
    first = next(v.first_divergence for v in off.verdicts if v.first_divergence)
    assert (first.fqn, first.rank) == (broken, 1)
