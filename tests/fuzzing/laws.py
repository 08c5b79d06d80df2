"""Whether a report proves what a policy asks, said a second time, from the contract alone.

Requirement: the gate is held against something that shares no code with it. This reads raw JSON
and the fields of a policy, and says in the plainest way what has to be there: the law is that
whatever the gate allows, however a file was altered, this calls proven too. It may be laxer than
the gate (which also refuses what contradicts itself), never stricter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from tpcheck.deployment_gate.policy import Policy

Json = dict[str, Any]

ORDER = ("WRONG", "ERROR", "DRIFT", "ILLEGAL", "INCONCLUSIVE", "PASS")


def unproven(report: Json, policy: Policy, now: datetime) -> str:
    """Return the first thing that is asked for and not there; nothing if all is."""
    return next(_lacks(report, policy, now), "")


def _lacks(report: Json, policy: Policy, now: datetime) -> Iterator[str]:
    path, verdicts = report["path"], report["verdicts"]
    outcomes = [one["outcome"] for one in verdicts]
    if report["schema"] != "tpcheck.report/1":
        yield "schema"
    if report["outcome"] != min(outcomes or ["INCONCLUSIVE"], key=ORDER.index):
        yield "the outcome is not the worst verdict"
    if "WRONG" in outcomes:
        yield "WRONG somewhere"
    if any(backend != path["backend"] for backend in policy.backends):
        yield "backend"
    if policy.require_deployed_path and (
        path["same_as_deployed"] is not True or path["differences"]
    ):
        yield "deployed path"
    for tp_size in policy.tp:
        for dtype in policy.dtypes:
            yield from _cell(verdicts, policy, tp_size, dtype)
    if policy.min_sensitivity > 0:
        facts = report["sensitivity"] or {}
        caught, planted = facts.get("caught"), facts.get("planted")
        if not _counts(caught, planted) or caught / planted < policy.min_sensitivity:
            yield "sensitivity"
    if policy.max_age_days is not None:
        made = datetime.fromisoformat(report["created"])
        if not -timedelta(minutes=5) <= now - made <= timedelta(days=policy.max_age_days):
            yield "age"
    if policy.subject is not None and report["subject"] != policy.subject:
        yield "subject"
    for name, wanted in policy.match.items():
        if not any(_same(found, wanted) for found in _at(report["environment"], name)):
            yield f"match {name}"
    if policy.engines is not None:
        engine = report.get("engine") or {}
        exact = f"{engine.get('name')}=={engine.get('version')}"
        if engine.get("name") not in policy.engines and exact not in policy.engines:
            yield "engine"


def _cell(verdicts: list[Json], policy: Policy, tp_size: int, dtype: str) -> Iterator[str]:
    here = [
        one
        for one in verdicts
        if _same(one["tp_size"], tp_size) and one["dtype"] == dtype and not _refused(one)
    ]
    where = f"tp={tp_size} {dtype}"
    if len({one["case_id"] for one in here}) < policy.min_cases:
        yield f"{where}: cases"
    for one in here:
        checks = one["checks"]
        if one["outcome"] not in ("PASS", *policy.allow):
            yield f"{where}: outcome"
        if one["outcome"] == "PASS" and not any(
            checks.get(name, {}).get("outcome") == "PASS" for name in ("structural", "drift")
        ):
            yield f"{where}: nothing was compared"
        if any(checks.get(name, {}).get("outcome") != "PASS" for name in policy.require):
            yield f"{where}: a required check"
        for name, check in checks.items():
            if one["outcome"] == "PASS" and check["outcome"] == "FAIL" and name != "allclose":
                yield f"{where}: PASS with {name} FAIL"
        yield from _numbers(checks, policy, where)


def _numbers(checks: Json, policy: Policy, where: str) -> Iterator[str]:
    limits = (
        (policy.max_drift_ratio, "drift", "ratio"),
        (policy.max_epsilons, "drift", "epsilons"),
        (policy.max_required_atol, "allclose", "required_atol"),
        (None if policy.max_required_atol is None else 0.0, "allclose", "rtol"),
    )
    for limit, name, fact in limits:
        check = checks.get(name, {})
        value = check.get(fact)
        if limit is not None and (not _number(value) or not 0 <= value <= limit):
            yield f"{where}: {name}.{fact}"
    margin = policy.max_argmax_flip_margin
    if margin is not None:
        profile = checks.get("drift", {}).get("profile") or {}
        entries = [one for one in profile["reductions"] if isinstance(one, dict)]
        deployed = [one for one in entries if one.get("deployed") is True]
        scores = deployed[0]["scores"]
        flips = scores["flips"]
        margins = [one["tp1_margin"] for one in flips["first"]]
        largest = flips.get("largest_margin")
        margins += [] if largest is None else [largest]
        if len(deployed) != 1 or scores["tokens_not_finite"] != 0 or not scores["tokens"]:
            yield f"{where}: flips are not known"
        if flips["count"] > len(flips["first"]) and not _number(largest):
            yield f"{where}: some flips are not known"
        if any(_number(one) and one > margin for one in margins):
            yield f"{where}: a flip"


def _refused(verdict: Json) -> bool:
    return set(verdict["checks"]) == {"plan"}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _counts(caught: Any, planted: Any) -> bool:
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in (caught, planted))
    return whole and 0 <= caught <= planted and planted > 0


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(_same(a, b) for a, b in pairs)
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def _at(value: Any, path: str) -> Iterator[Any]:
    """Yield everything that a dotted path may mean."""
    if isinstance(value, dict):
        if path in value:
            yield value[path]
        for i, char in enumerate(path):
            if char == "." and path[:i] in value:
                yield from _at(value[path[:i]], path[i + 1 :])
