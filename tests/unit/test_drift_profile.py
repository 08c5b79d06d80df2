"""Every number of a drift profile, against a computation of its own."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.judging import trace, values
from tpcheck.drift_profiles.profile import Carried, DriftEvidence, profile
from tpcheck.drift_profiles.scores import MAX_FLIPS
from tpcheck.numerics.drift import expected_ratio
from tpcheck.numerics.ulp import eps, ulp
from tpcheck.observation.wire import Seen

VOCAB = 24
EPS = eps("bfloat16")


def ids(seed: int) -> Tensor:
    return torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))


def logits(seed: int) -> Tensor:
    return values(2, 8, VOCAB, seed=seed)


def noisy(x: Tensor, size: float, seed: int) -> Tensor:
    """Return x with normal errors of `size` eps each, in float64."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
    return x + size * EPS * noise


ORACLE = {"A": logits(0), "B": logits(1)}
BASE = {key: noisy(x, 1.0, i) for i, (key, x) in enumerate(ORACLE.items())}
NATIVE = {key: noisy(x, 1.5, 7 + i) for i, (key, x) in enumerate(ORACLE.items())}
OTHER = {key: noisy(x, 3.0, 17 + i) for i, (key, x) in enumerate(ORACLE.items())}


def seen(**fields: Any) -> list[Seen]:
    given: dict[str, Any] = {"largest_partial": 4.0, "largest_sum": 6.0, **fields}
    return [Seen({"bfloat16": 3}, **given), Seen(dtypes={"bfloat16": 3}, largest_partial=1.0)]


def evidence(**fields: Any) -> DriftEvidence:
    given = DriftEvidence(
        dtype="bfloat16",
        tp_size=4,
        base=trace(0, BASE),
        carried=[
            Carried("bfloat16", True, trace(0, NATIVE), seen(), response=0.01),
            Carried("float32", False, trace(0, OTHER), seen(), response=0.01),
        ],
        oracle=trace(0, ORACLE),
        vocab_size=VOCAB,
        ids={"A": ids(0), "B": ids(1)},
    )
    return replace(given, **fields)


def row(index: int = 0, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = profile(evidence(**fields))["reductions"][index]
    return found


def cat(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in outputs.values()])


def rms(x: Tensor) -> float:
    return math.sqrt(float((x * x).mean()))


def carried(outputs: dict[str, Tensor], **fields: Any) -> list[Carried]:
    return [Carried("bfloat16", True, trace(0, outputs), seen(**fields), response=0.01)]


# -- errors


def test_errors_are_in_eps_of_the_dtype_times_the_oracles_rms() -> None:
    found = profile(evidence())
    unit = EPS * rms(cat(ORACLE))
    assert found["tp1"]["epsilons"] == pytest.approx(rms(cat(BASE) - cat(ORACLE)) / unit)
    error = found["reductions"][0]["error"]
    wrong = (cat(NATIVE) - cat(ORACLE)).abs()
    assert error["epsilons"] == pytest.approx(rms(wrong) / unit)
    assert error["relative_rms"] == pytest.approx(rms(wrong) / rms(cat(ORACLE)))
    assert error["max"] == pytest.approx(float(wrong.max()) / unit)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999)):
        assert float((wrong / unit <= error[name] * (1 + 1e-12)).double().mean()) >= share
        assert float((wrong / unit < error[name] * (1 - 1e-12)).double().mean()) < share


def test_the_ratio_is_of_both_errors_and_lies_in_its_interval() -> None:
    found = row()
    ratio = rms(cat(NATIVE) - cat(ORACLE)) / rms(cat(BASE) - cat(ORACLE))
    assert found["ratio"] == pytest.approx(ratio)
    low, high = found["interval"]
    assert low < ratio < high
    # 768 normal errors on either side: one standard error is 1 / sqrt(768) of the ratio
    assert high - low == pytest.approx(2 * 1.96 * ratio / math.sqrt(768), rel=0.35)


def test_tokens_of_one_sequence_are_one_piece_of_evidence() -> None:
    """A sequence whose tokens repeat one another tells no more than one token of each."""

    def interval(repeats: int) -> tuple[float, float]:
        outputs = [
            {key: x[:, :1].repeat(1, repeats, 1) for key, x in run.items()}
            for run in (ORACLE, BASE, NATIVE)
        ]
        oracle, base, native = outputs
        found = row(base=trace(0, base), oracle=trace(0, oracle), carried=carried(native), ids={})
        return found["interval"][0], found["interval"][1]

    assert interval(8) == pytest.approx(interval(1))


def test_outputs_without_a_dim_of_tokens_are_told_apart_by_row() -> None:
    outputs = [{key: x[:, 0, 0] for key, x in run.items()} for run in (ORACLE, BASE, NATIVE)]
    oracle, base, native = (trace(0, one) for one in outputs)
    given = [Carried("bfloat16", True, native, seen())]
    found = row(base=base, oracle=oracle, carried=given, vocab_size=0, ids={})
    assert found["interval"][0] < found["ratio"] < found["interval"][1]


def test_a_reduction_is_held_against_the_deployed_one_on_the_same_tokens() -> None:
    assert row(0)["over_deployed"] is None
    found = row(1)
    expected = rms(cat(OTHER) - cat(ORACLE)) / rms(cat(NATIVE) - cat(ORACLE))
    assert found["over_deployed"] == pytest.approx(expected)
    assert found["over_deployed_interval"][0] < expected < found["over_deployed_interval"][1]


def test_an_exact_tp1_counts_as_its_floor() -> None:
    found = row(base=trace(0, ORACLE))
    unit = EPS * rms(cat(ORACLE))
    assert found["ratio"] == pytest.approx(rms(cat(NATIVE) - cat(ORACLE)) / (0.15 * unit))


# -- the prediction


def test_the_prediction_adds_the_response_to_tp1s_own_error() -> None:
    at_1 = rms(cat(BASE) - cat(ORACLE))
    response = at_1 * math.sqrt(1.5**2 - 1)
    carried = [replace(evidence().carried[0], response=response)]
    found = row(carried=carried)["prediction"]
    assert found["ratio"] == pytest.approx(1.5)
    assert (found["valid"], found["reason"]) == (True, "")
    assert found["bare_layer"] == expected_ratio(4, "ring")


def test_a_prediction_far_from_what_is_measured_is_not_valid_here() -> None:
    at_1 = rms(cat(BASE) - cat(ORACLE))
    for ratio in (1.0, 3.0):  # 1.5 is measured
        one = replace(evidence().carried[0], response=at_1 * math.sqrt(ratio**2 - 1))
        found = row(carried=[one])["prediction"]
        assert not found["valid"]
        assert "x it" in found["reason"]


def test_what_cannot_be_predicted_says_why() -> None:
    found = row(not_valid="the subject casts to bfloat16 itself")["prediction"]
    assert found["ratio"] is None
    assert (found["valid"], found["reason"]) == (False, "the subject casts to bfloat16 itself")


def test_the_limit_is_what_the_law_or_the_prediction_explains_whichever_is_more() -> None:
    at_1 = rms(cat(BASE) - cat(ORACLE))
    assert row()["limit"] == 3.0
    one = replace(evidence().carried[0], response=10 * at_1)
    assert row(carried=[one])["limit"] == pytest.approx(1.5 * math.sqrt(101))


# -- differences from TP=1


def test_the_histogram_counts_differences_in_ulp_of_tp1s_values() -> None:
    base = {"A": torch.full((2, 8, VOCAB), 1.5).double()}
    step = ulp(1.5, "bfloat16")
    moved = base["A"].clone()
    moved[0, 0, :5] += torch.tensor([0.25, 1.0, 1.5, 4.0, 5.0]).double() * step
    native = trace(0, {"A": moved})
    found = row(
        base=trace(0, base),
        oracle=trace(0, base),
        carried=[Carried("bfloat16", True, native, seen())],
    )
    assert found["difference"]["ulp"] == [
        [0, 16 * VOCAB - 5],
        [1, 2],
        [2, 1],
        [4, 1],
        [8, 1],
    ]
    assert found["difference"]["max"] == pytest.approx(5 * step)


def test_allclose_says_what_would_have_passed() -> None:
    seed, derived = row()["allclose"]
    apart, size = (cat(NATIVE) - cat(BASE)).abs(), cat(BASE).abs()
    assert (seed["atol"], seed["rtol"], seed["source"]) == (1e-2, 1e-2, "preset seed-1e-2")
    assert seed["mismatches"] == int((apart > 1e-2 + 1e-2 * size).sum())
    assert seed["passes"] is (seed["mismatches"] == 0)
    assert bool((apart <= seed["required_atol"] * (1 + 1e-9) + 1e-2 * size).all())
    both = seed["required_both"]
    assert bool((apart <= both * (1 + size) * (1 + 1e-9)).all())
    assert not bool((apart <= both * (1 + size) * (1 - 1e-9)).all())
    assert derived["source"].startswith("derived")
    assert derived["passes"]


# -- where


def test_errors_by_rank_are_those_of_its_shard_of_the_vocabulary() -> None:
    moved = {key: x.clone() for key, x in ORACLE.items()}
    moved["A"][..., 12:18] += 1.0
    found = row(carried=carried(moved))["by_rank"]
    assert [one["rank"] for one in found] == [0, 1, 2, 3]
    unit = EPS * rms(cat(ORACLE))
    # half of the tokens are off by 1 on all of rank 2's columns
    assert [one["epsilons"] for one in found] == pytest.approx([0, 0, math.sqrt(0.5) / unit, 0])
    assert all(one["tp1_epsilons"] > 0 for one in found)


def test_errors_by_position_are_those_of_all_sequences_there() -> None:
    moved = {key: x.clone() for key, x in ORACLE.items()}
    for x in moved.values():
        x[:, 3] += 1.0
    found = row(carried=carried(moved))["by_position"]
    assert [(one["from"], one["to"]) for one in found] == [(i, i + 1) for i in range(8)]
    unit = EPS * rms(cat(ORACLE))
    expected = [1 / unit if i == 3 else 0.0 for i in range(8)]
    assert [one["epsilons"] for one in found] == pytest.approx(expected)


# -- scores


def test_log_probabilities_and_divergence_are_of_tp1_against_tpn() -> None:
    found = row()["scores"]
    p, q, o = (
        torch.cat([x.reshape(-1, VOCAB) for x in outputs.values()]).log_softmax(-1)
        for outputs in (BASE, NATIVE, ORACLE)
    )
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found["tokens"] == 32
    assert found["log_prob_max"] == pytest.approx(float((p - q).abs().max()))
    assert found["log_prob_rms"] == pytest.approx(rms(p - q))
    assert found["kl_mean"] == pytest.approx(float(kl.mean()))
    assert found["kl_max"] == pytest.approx(float(kl.max()))
    against = torch.nn.functional.kl_div(p, o, log_target=True, reduction="none").sum(-1)
    assert found["tp1_kl_oracle_mean"] == pytest.approx(float(against.mean()))


def test_each_flip_comes_with_its_place_its_tokens_and_tp1s_margin() -> None:
    base = {key: x.clone() for key, x in ORACLE.items()}
    base["B"][1, 2] = 0.0
    base["B"][1, 2, 5], base["B"][1, 2, 9] = 2.0, 1.75
    moved = {key: x.clone() for key, x in base.items()}
    moved["B"][1, 2, 9] = 2.5
    found = row(base=trace(0, base), carried=carried(moved))["scores"]["flips"]
    assert found["count"] == 1
    assert found["first"] == [
        {"input": "B", "index": [1, 2], "tp1_token": 5, "token": 9, "tp1_margin": 0.25}
    ]


def test_all_flips_are_counted_and_twenty_shown() -> None:
    moved = {key: -x for key, x in BASE.items()}
    found = row(carried=carried(moved))["scores"]["flips"]
    assert found["count"] == 32
    assert len(found["first"]) == MAX_FLIPS == 20


def test_the_largest_margin_is_that_of_all_flips_and_not_of_those_shown() -> None:
    base = {key: x.clone() for key, x in ORACLE.items()}
    base["B"][-1, -1] = 0.0
    base["B"][-1, -1, 5] = 64.0  # the last token of all, far beyond the twenty
    moved = {key: -x for key, x in base.items()}
    found = row(base=trace(0, base), carried=carried(moved))["scores"]["flips"]
    assert max(one["tp1_margin"] for one in found["first"]) < 64.0
    assert found["largest_margin"] == 64.0


def test_without_a_flip_there_is_no_largest_margin() -> None:
    same = {key: x.clone() for key, x in ORACLE.items()}
    found = row(base=trace(0, same), carried=carried(same))["scores"]["flips"]
    assert found == {"count": 0, "first": [], "largest_margin": None}


def test_top_k_overlap_is_the_share_of_tp1s_tokens_that_tpn_has_too() -> None:
    base = {"A": torch.arange(VOCAB).double().repeat(2, 8, 1)}
    moved = {"A": base["A"].clone()}
    moved["A"][..., -1] = -1.0  # the winner falls to the end: the five best lose one
    found = row(base=trace(0, base), oracle=trace(0, base), carried=carried(moved))["scores"]
    assert found["top_k"] == {"1": 0.0, "5": pytest.approx(0.8), "20": pytest.approx(0.95)}


def test_top_k_beyond_the_vocabulary_has_no_number() -> None:
    small = {"A": values(2, 8, 6)}
    same: dict[str, Any] = {
        "base": trace(0, small),
        "oracle": trace(0, small),
        "carried": carried(small),
    }
    found = row(**same, vocab_size=6, ids={})
    assert found["scores"]["top_k"] == {"1": 1.0, "5": 1.0, "20": None}


def test_sequence_scores_drift_by_the_sum_of_their_tokens_log_probabilities() -> None:
    found = row()["sequences"]
    assert found["sequences"] == 4
    assert found["lengths"] == [1, 2, 4, 7]
    sums: list[list[float]] = []
    for key in ORACLE:
        for b in range(2):
            p, q = BASE[key][b].log_softmax(-1), NATIVE[key][b].log_softmax(-1)
            gaps = [
                float(q[t, n] - p[t, n]) for t, n in enumerate(ids(int(key == "B"))[b, 1:].tolist())
            ]
            sums.append([abs(sum(gaps[:length])) for length in (1, 2, 4, 7)])
    columns = list(zip(*sums, strict=True))
    assert found["mean"] == pytest.approx([sum(column) / 4 for column in columns])
    assert found["max"] == pytest.approx([max(column) for column in columns])
    assert all(value > 0 for value in found["tp1_mean"])


def test_steps_are_scored_apart_from_whole_forwards() -> None:
    decode = {"decode": noisy(ORACLE["A"], 2.0, 30)}
    found = row(
        base=trace(0, BASE | {"decode": BASE["A"]}),
        oracle=trace(0, ORACLE | {"decode": ORACLE["A"]}),
        carried=carried(NATIVE | decode),
    )
    assert found["decode"]["sequences"] == 2
    assert found["decode"]["mean"] != found["sequences"]["mean"]
    assert found["sequences"]["sequences"] == 4


def test_outputs_that_are_no_logits_have_no_scores_and_say_so() -> None:
    found = row(vocab_size=0, ids={})
    for name in ("scores", "sequences", "decode", "by_rank"):
        assert found[name] is None
        assert "no logits" in found[f"{name}_reason"]
    assert found["error"]["epsilons"] > 0


# -- range


def test_headroom_is_against_the_largest_partial_or_sum_of_any_rank() -> None:
    found = row()["range"]
    assert found["largest_partial"] == 4.0
    assert found["largest_sum"] == 6.0
    assert found["float16_headroom"] == pytest.approx(65504 / 6)
    assert found["headroom"] == pytest.approx(torch.finfo(torch.bfloat16).max / 6)
    assert (found["sums"], found["operands"]) == (3, {"bfloat16": 3})


def test_an_overflow_has_no_ratio_and_is_counted() -> None:
    moved = {key: x.clone() for key, x in NATIVE.items()}
    moved["A"][0, 1, 4], moved["B"][1, 1] = math.inf, math.nan
    found = row(carried=carried(moved, overflowed=7))
    assert (found["ratio"], found["within"]) == (None, False)
    assert "overflow: 25 outputs" in found["ratio_reason"]
    assert found["range"]["overflowed_outputs"] == 1 + VOCAB
    assert found["range"]["overflowed_sums"] == 7
    assert found["scores"]["tokens_not_finite"] == 2
    assert found["allclose"][0]["required_atol"] is None


def test_what_tp1_does_not_hold_either_is_no_overflow() -> None:
    everywhere = [{k: x.clone() for k, x in o.items()} for o in (ORACLE, BASE, NATIVE)]
    for outputs in everywhere:
        outputs["A"][0, 0, 0] = -math.inf  # a masked logit
    oracle, base, native = everywhere
    found = row(oracle=trace(0, oracle), base=trace(0, base), carried=carried(native))
    assert found["range"]["overflowed_outputs"] == 0
    assert found["ratio"] == pytest.approx(1.5, rel=0.2)


# -- what is missing


def test_a_wire_that_could_not_be_tried_says_why_and_has_no_number() -> None:
    missing = Carried("int8_wire", reason="the subject calls torch.distributed itself")
    found = profile(evidence(carried=[*evidence().carried, missing]))["reductions"][2]
    assert found == {
        "reduction": "int8_wire",
        "deployed": False,
        "reason": "the subject calls torch.distributed itself",
    }


def test_without_an_oracle_there_is_no_ratio_but_still_a_difference() -> None:
    found = profile(evidence(oracle=None, not_valid="there is no float64 run"))
    assert found["oracle"] is None
    assert found["tp1"] is None
    one = found["reductions"][0]
    assert one["error"] is None
    assert (one["ratio"], one["within"]) == (None, None)
    assert "TP=1's own error is not known" in one["ratio_reason"]
    assert one["difference"]["rms"] == pytest.approx(rms(cat(NATIVE) - cat(BASE)))
    assert one["scores"]["kl_mean"] > 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_profile_is_json_with_finite_numbers_only(broken: bool) -> None:
    outputs = {key: x * math.nan if broken else x for key, x in NATIVE.items()}
    json.dumps(profile(evidence(carried=carried(outputs))), allow_nan=False)
