"""What a policy asks of the report as a whole: its path, sensitivity, age, environment, engine.

Requirement: a verdict speaks for what carried it, when, and where. What the report does not say of
that is not known, and refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from tpcheck.deployment_gate.case_ids import is_of_several
from tpcheck.deployment_gate.commands import Commands
from tpcheck.deployment_gate.numbers import shown, whole
from tpcheck.deployment_gate.policy import Policy
from tpcheck.deployment_gate.requirement import Requirement
from tpcheck.records import Report

CLOCK_SKEW = timedelta(minutes=5)
"""Two machines' clocks may differ by so much; a report from further in the future is not dated."""

_MISSING: Any = object()
_NOT_NCCL = (
    "in the policy, require_deployed_path = false, if that is what will be deployed; else nccl"
    " among its backends, and a report from there"
)
_ONE_BY_ONE = "a report of each subject alone: pytest --tp-report with its tests, or tpcheck run"
_STANDS_FOR = {"gloo": ("gloo", "sim")}
"""Backend -> where its sensitivity may be measured: `run` plants faults for gloo in simulation,
whose sums are bit-exact against Gloo's (sensitivity.py)."""


def surroundings_requirements(
    report: Report, policy: Policy, commands: Commands, now: datetime
) -> Iterator[Requirement]:
    """Yield what is asked of the report as a whole."""
    settle = commands.everything()
    if is_of_several(report.subject):
        problem = (
            f"this report is about several subjects ({report.subject}): a degree that one of them"
            " proves is not proven for the others"
        )
        yield _held("subject", "one subject", report.subject, problem, _ONE_BY_ONE)
    elif policy.subject is not None:
        other = report.subject != policy.subject
        problem = f"this report is about {report.subject}, not {policy.subject}" if other else ""
        settling = commands.about(policy.subject)
        yield _held("subject", policy.subject, report.subject, problem, settling)
    if policy.require_deployed_path:
        problem = _path_problem(report)
        found = problem or "it was exercised"
        # no report from another backend is ever of the deployed path: only the policy settles that
        other = report.path.backend in policy.backends and report.path.backend != "nccl"
        settling = _NOT_NCCL if other else settle
        yield _held("require_deployed_path", "the deployed path", found, problem, settling)
    if policy.min_sensitivity > 0:
        asked = f"{policy.min_sensitivity:g} of planted faults"
        problem = _sensitivity_problem(report, policy.min_sensitivity)
        said = problem or _share_caught(report)
        yield _held("min_sensitivity", asked, said, problem, settle)
    if policy.max_age_days is not None:
        asked = f"at most {policy.max_age_days:g} days old"
        problem = _age_problem(report, policy.max_age_days, now)
        yield _held("max_age_days", asked, problem or f"made {report.created}", problem, settle)
    for path, wanted in policy.match.items():
        problem = _match_problem(report.environment, path, wanted)
        asked = f"environment.{path}={shown(wanted)}"
        yield _held(f"match.{path}", asked, problem or asked, problem, settle)
    if policy.engines is not None:
        asked = f"carried by {' or '.join(policy.engines)}"
        problem = _engine_problem(report, policy.engines)
        yield _held("engines", asked, problem or asked, problem, settle)


def _held(key: str, asked: str, found: str, problem: str, settle: str) -> Requirement:
    return Requirement(
        key, asked, found, met=not problem, reason=problem, settle=settle if problem else ""
    )


def _path_problem(report: Report) -> str:
    path = report.path
    if path.same_as_deployed:
        return ""
    why = "; ".join(path.differences) or "the report does not say how it differs"
    return f"the deployed path was not exercised: {why}"


def _sensitivity_problem(report: Report, wanted: float) -> str:
    facts = report.sensitivity
    if facts is None:
        said = [note for note in report.notes if note.startswith("sensitivity was not measured")]
        return f"sensitivity: {said[0] if said else 'was not measured'}"
    caught, planted = whole(facts.get("caught")), whole(facts.get("planted"))
    if not planted or caught is None or caught > planted:
        found = f"caught={shown(facts.get('caught'))}, planted={shown(facts.get('planted'))}"
        return f"sensitivity: {found}, but should be whole numbers, planted at least caught and 1"
    elsewhere = _measured_elsewhere(report, facts)
    if elsewhere:
        return f"sensitivity: {elsewhere}"
    if caught / planted < wanted:
        blind = facts.get("blind_to")
        names = [str(name) for name in blind] if isinstance(blind, list | tuple) else []
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        to = f"; blind to {', '.join(names[:3])}{rest}" if names else ""
        return (
            f"sensitivity: {caught} of {planted} planted faults were caught, but should be at"
            f" least {wanted:g} of them{to}"
        )
    return ""


def _measured_elsewhere(report: Report, facts: Mapping[str, Any]) -> str:
    """Say what a measurement is not about this report's verdicts; only what it says is held."""
    here = report.path.backend
    backend = facts.get("backend", here)
    if backend not in _STANDS_FOR.get(here, (here,)):
        return f"was measured on {shown(backend)}, but should be on {here} as the verdicts"
    for name in ("case_id", "tp_size", "dtype"):
        if name not in facts:
            return ""
    key = (facts["case_id"], facts["tp_size"], facts["dtype"])
    # a list, because what a report says need not have a hash
    keys = [(one.case_id, one.tp_size, one.dtype) for one in report.verdicts]
    if isinstance(key[1], bool) or key not in keys:
        found = ", ".join(shown(value) for value in key)
        return f"was measured in {found}, but should be in a verdict of this report"
    return ""


def _share_caught(report: Report) -> str:
    facts = report.sensitivity or {}
    return f"{facts.get('caught')} of {facts.get('planted')} caught"


def _age_problem(report: Report, limit_days: float, now: datetime) -> str:
    if not report.created:
        return "age: the report does not say when it was made"
    try:
        made = datetime.fromisoformat(report.created)
    except ValueError:
        made = None
    if made is None or made.tzinfo is None:
        return (
            f"age: created={shown(report.created)}, but should be a time with its zone like"
            " 2026-01-31T12:00:00Z"
        )
    try:
        age = now - made
    except OverflowError:
        return f"age: created={shown(report.created)} is out of reach"
    if age < -CLOCK_SKEW:
        return f"age: created={shown(report.created)} is in the future"
    days = age / timedelta(days=1)
    if days > limit_days:
        old = f"{days:.1f}" if float(f"{days:.1f}") > limit_days else repr(days)
        return f"age: the report is {old} days old, but should be at most {limit_days:g}"
    return ""


def _match_problem(environment: Mapping[str, Any], path: str, wanted: Any) -> str:
    found = _look_up(environment, path)
    if found is _MISSING or found is None:
        said = "missing" if found is _MISSING else "null"
        return f"environment.{path} is {said}, but should be {shown(wanted)}"
    if not _same(found, wanted):
        return f"environment.{path}={shown(found)}, but should be {shown(wanted)}"
    return ""


def _look_up(value: Any, path: str) -> Any:
    """Return what stands at a dotted path; a key that itself has dots is found too."""
    if not isinstance(value, Mapping):
        return _MISSING
    if path in value:
        return value[path]
    for i, char in enumerate(path):
        if char == "." and path[:i] in value:
            found = _look_up(value[path[:i]], path[i + 1 :])
            if found is not _MISSING:
                return found
    return _MISSING


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(_same(a, b) for a, b in pairs)
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted  # 1 is not true
    return bool(found == wanted)


def _engine_problem(report: Report, engines: tuple[str, ...]) -> str:
    wanted = " or ".join(engines)
    engine = report.engine
    if engine is None:
        return f"engine: the report does not say which engine carried it, but should be {wanted}"
    name, version = engine.get("name"), engine.get("version")
    if not isinstance(name, str) or not name:
        return f"engine.name={shown(name)}, but should be {wanted}"
    exact = f"{name}=={version}" if isinstance(version, str) else name
    if name not in engines and exact not in engines:
        return f"engine is {exact}, but should be {wanted}"
    return ""
