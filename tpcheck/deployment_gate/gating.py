"""gate(report, policy): quiet, or GateRefused with every reason. Torch-free.

Requirement: whoever calls it before a deployment gets an exception unless everything is proven, and
that exception says all there is to do. A report or policy that cannot be read refuses as well, as
the TPCheckError it is. A report is judged as it would be stored, whether it comes as a file, as its
JSON or fresh from a run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tpcheck.deployment_gate.decision import Decision, decide
from tpcheck.deployment_gate.policy import Policy, parse_policy, policy_json, read_policy
from tpcheck.deployment_gate.requirement import listed
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.json_reader import parse_json, refuse
from tpcheck.records import Report
from tpcheck.report import from_json, read_report, to_json

SCHEMA = "tpcheck.decision/1"

Json = dict[str, Any]
PathLike = str | os.PathLike[str]


def gate(
    report: Report | Mapping[str, Any] | PathLike, policy: Policy | Mapping[str, Any] | PathLike
) -> None:
    """Return quietly if a report proves what a policy asks for; raise otherwise.

    Args:
        report: a Report, its JSON as a dict, or the path of its file.
        policy: a Policy, a dict as a TOML file would give it, or the path of that file.

    Raises:
        GateRefused: something is not proven. The message lists every reason with the command that
            would settle it; `refusals` holds them, each with `reason` and `settle`.
        TPCheckError: the report or the policy cannot be read, or is none.

    Example:
        >>> import tpcheck
        >>> report = tpcheck.run("builtin:llama-tiny", (2,), backend="sim", sensitivity=True)
        >>> policy = {"tp": [2], "dtypes": ["bfloat16"], "backends": ["sim"]}
        >>> tpcheck.gate(report, policy | {"require_deployed_path": False})
        >>> try:
        ...     tpcheck.gate(report, policy)
        ... except tpcheck.GateRefused as refused:
        ...     print(refused.refusals[0].reason[:35])
        the deployed path was not exercised
    """
    asked = as_policy(policy)
    place = str(report) if isinstance(report, str | os.PathLike) else "REPORT.json"
    decision = decide(as_report(report), asked, datetime.now(UTC), report_path=place)
    if not decision.allowed:
        raise GateRefused(refusal_text(decision), refusals=decision.refusals)


def as_report(value: Report | Mapping[str, Any] | PathLike) -> Report:
    """Return a report as it would be read from a file, whatever it is given as.

    Raises:
        TPCheckError: it is no report, cannot be read or contradicts itself.
    """
    if isinstance(value, str | os.PathLike):
        return read_report(value)
    if isinstance(value, Report):
        return from_json(_as_stored(to_json(value)))
    if isinstance(value, Mapping):
        return from_json(_as_stored(dict(value)))
    refuse("report", value, "a Report, a dict or the path of a report")


def as_policy(value: Policy | Mapping[str, Any] | PathLike) -> Policy:
    """Return a policy, whatever it is given as.

    Raises:
        TPCheckError: it is no policy or cannot be read.
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str | os.PathLike):
        return read_policy(value)
    if isinstance(value, Mapping):
        return parse_policy(value)
    refuse("policy", value, "a Policy, a dict or the path of a policy")


def refusal_text(decision: Decision) -> str:
    """Return every reason, each with the command that would settle it, the count first."""
    return listed(f"REFUSED: {decision.subject}", decision.refusals)


def decision_json(decision: Decision, policy: Policy, report: Report) -> Json:
    """Return a decision as plain JSON values: all that was asked, found, met, and how to settle it.

    `requirements` are in the order in which they were looked at; `refusals` repeat those not met,
    each once.
    """
    return {
        "schema": SCHEMA,
        "outcome": "ALLOWED" if decision.allowed else "REFUSED",
        "subject": decision.subject,
        "decided": decision.decided.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "report": {
            "outcome": report.outcome,
            "backend": report.path.backend,
            "created": report.created or None,
            "tpcheck": report.tpcheck,
        },
        "policy": policy_json(policy),
        "policy_sha256": decision.policy,
        "requirements": [
            {
                "key": one.key,
                "where": one.where,
                "asked": one.asked,
                "found": one.found,
                "met": one.met,
                "reason": one.reason or None,
                "settle": one.settle or None,
            }
            for one in decision.requirements
        ],
        "refusals": [{"reason": one.reason, "settle": one.settle} for one in decision.refusals],
        "notes": list(decision.notes),
    }


def _as_stored(value: Json) -> Any:
    try:
        return parse_json(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TPCheckError(f"report: cannot be stored as JSON: {error}") from error
