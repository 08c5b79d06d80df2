"""What all profiles of a report come to: one row per degree, dtype and reduction, and findings.

Requirement: several cases are one answer, with an interval over the cases. Pure functions of
profiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tpcheck.drift_profiles.findings import compared_dtypes, findings_of, wrong_findings
from tpcheck.numerics.drift import ERROR_FLOOR
from tpcheck.numerics.spread import mean_ratio_interval

Json = dict[str, Any]


def summary(profiles: Sequence[tuple[int, str, str, Json]]) -> Json:
    """Return what profiles come to; each is (degree, dtype, the verdict's outcome, profile).

    Returns:
        `rows`, one per dtype, degree and reduction:
            `tp_size`, `dtype`, `reduction`, `deployed`, `cases`, `tokens`, or `reason` where there
                is no number;
            `tp1_epsilons`, `epsilons`, `relative_rms`: root mean squares over cases;
            `ratio` of the first two, `interval` of it and what that is `interval_over`, the
                "sequences" of one case or "cases";
            `over_deployed`, its error over that of what is deployed, and `over_deployed_interval`;
            `predicted`, and `prediction_reason` where that is not valid in some case;
            `flips` and the largest `flip_margin` of those shown, `kl_mean`, `kl_max`;
            `largest_partial`, `float16_headroom`, `overflowed_outputs`;
            `required_both`: the smallest tolerance, atol and rtol both, that passes against TP=1;
            `outcome`: of what is deployed the worst verdict, of others what the drift check would
                say: "explained", "above" the limit, "overflow" or "unknown". Cases that are WRONG
                have a row of their own: their distance is no rounding.
        `findings`: see findings.py, each with `dtype` and `tp_size`.
    """
    groups: dict[tuple[str, int, bool], list[tuple[str, Json]]] = {}
    for tp_size, dtype, outcome, profile in profiles:
        groups.setdefault((dtype, tp_size, outcome == "WRONG"), []).append((outcome, profile))
    rows: list[Json] = []
    findings: list[Json] = []
    for (dtype, tp_size, wrong), group in groups.items():
        here = _rows(tp_size, dtype, group)
        held = [profile for _, profile in group]
        found = wrong_findings(held, here) if wrong else findings_of(held, here)
        findings += [{**one, "dtype": dtype, "tp_size": tp_size} for one in found]
        rows += here
    sound = [row for row in rows if row.get("outcome") != "WRONG"]
    return {"rows": rows, "findings": [*findings, *compared_dtypes(sound)]}


def _rows(tp_size: int, dtype: str, group: Sequence[tuple[str, Json]]) -> list[Json]:
    rows = []
    for entry in group[0][1]["reductions"]:
        name = entry["reduction"]
        own = [(outcome, p, _entry(p, name)) for outcome, p in group]
        kept = [(outcome, p, one) for outcome, p, one in own if one and "reason" not in one]
        head: Json = {"tp_size": tp_size, "dtype": dtype, "reduction": name}
        head |= {"deployed": entry["deployed"], "cases": len(kept)}
        rows.append({**head, **(_row(kept) if kept else {"reason": entry["reason"]})})
    return rows


def _entry(profile: Json, reduction: str) -> Json | None:
    return next((one for one in profile["reductions"] if one["reduction"] == reduction), None)


def _row(kept: Sequence[tuple[str, Json, Json]]) -> Json:
    entries = [one for _, _, one in kept]
    overflowed = sum(one["range"]["overflowed_outputs"] for one in entries)
    known = all(one["error"] is not None for one in entries)
    ratios = [one["ratio"] for one in entries]
    scores = [one["scores"] for one in entries if one["scores"] and one["scores"]["tokens"]]
    partials = [one["range"]["largest_partial"] for one in entries]
    headrooms = [one["range"]["float16_headroom"] for one in entries]
    row: Json = {
        "tokens": sum(one["tokens"] for one in scores) or None,
        "tp1_epsilons": _rms([p["tp1"]["epsilons"] for _, p, _ in kept]) if known else None,
        "epsilons": _rms([one["error"]["epsilons"] for one in entries]) if known else None,
        "relative_rms": _rms([one["error"]["relative_rms"] for one in entries]) if known else None,
        "ratio": None,
        "interval": None,
        "interval_over": None,
        **_over_deployed(kept),
        "predicted": _rms([one["prediction"]["ratio"] for one in entries]),
        "prediction_reason": next(
            (one["prediction"]["reason"] for one in entries if not one["prediction"]["valid"]), ""
        ),
        "flips": sum(one["flips"]["count"] for one in scores) if scores else None,
        "flip_margin": max(
            (flip["tp1_margin"] for one in scores for flip in one["flips"]["first"]), default=None
        ),
        "kl_mean": _mean([one["kl_mean"] for one in scores], [one["tokens"] for one in scores]),
        "kl_max": max((one["kl_max"] for one in scores), default=None),
        "largest_partial": max((x for x in partials if x is not None), default=None),
        "float16_headroom": min((x for x in headrooms if x is not None), default=None),
        "overflowed_outputs": overflowed,
        "required_both": _largest([one["allclose"][0]["required_both"] for one in entries]),
        "outcome": _outcome(kept, overflowed),
    }
    if overflowed or None in ratios:
        row["ratio_reason"] = next(one["ratio_reason"] for one in entries if one["ratio"] is None)
        return row
    return row | _ratio(kept)


def _ratio(kept: Sequence[tuple[str, Json, Json]]) -> Json:
    if len(kept) == 1:
        one = kept[0][2]
        over = "sequences" if one["interval"] else None
        return {"ratio": one["ratio"], "interval": one["interval"], "interval_over": over}
    actual = [_squared(one) for _, _, one in kept]
    expected = [max(p["tp1"]["epsilons"] or 0.0, ERROR_FLOOR) ** 2 for _, p, _ in kept]
    between = _between(actual, expected)
    return {
        "ratio": math.sqrt(sum(actual) / sum(expected)),
        "interval": between,
        "interval_over": None if between is None else "cases",
    }


def _over_deployed(kept: Sequence[tuple[str, Json, Json]]) -> Json:
    names = ("over_deployed", "over_deployed_interval")
    if len(kept) == 1:
        return {name: kept[0][2][name] for name in names}
    if any(one["over_deployed"] is None for _, _, one in kept):
        return dict.fromkeys(names)
    actual = [_squared(one) for _, _, one in kept]
    expected = [_squared(_deployed(profile)) for _, profile, _ in kept]
    if not sum(expected):
        return dict.fromkeys(names)
    ratio = math.sqrt(sum(actual) / sum(expected))
    return dict(zip(names, (ratio, _between(actual, expected)), strict=True))


def _deployed(profile: Json) -> Json:
    found: Json = next(one for one in profile["reductions"] if one["deployed"])
    return found


def _squared(entry: Json) -> float:
    """Return a squared error in epsilons; an output of zeros has no unit for one, and none."""
    return float(entry["error"]["epsilons"] or 0.0) ** 2


def _between(actual: Sequence[float], expected: Sequence[float]) -> list[float] | None:
    interval = mean_ratio_interval(actual, expected)
    return None if interval is None else [interval.low, interval.high]


def _outcome(kept: Sequence[tuple[str, Json, Json]], overflowed: int) -> str:
    if kept[0][2]["deployed"]:
        outcomes = [outcome for outcome, _, _ in kept]
        return next((one for one in outcomes if one != "PASS"), "PASS")
    if overflowed:
        return "overflow"
    within = [one["within"] for _, _, one in kept]
    if None in within:
        return "unknown"
    return "explained" if all(within) else "above"


def _largest(values: Sequence[float | None]) -> float | None:
    return None if None in values else max((x for x in values if x is not None), default=None)


def _rms(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.sqrt(sum(value**2 for value in known) / len(known))


def _mean(values: Sequence[float], weights: Sequence[int]) -> float | None:
    total = sum(weights)
    if not total:
        return None
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total
