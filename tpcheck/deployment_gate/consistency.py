"""Where a report contradicts itself: such a report was edited, cut or mixed, and proves nothing.

Requirement: a gate reads what others wrote. The reader (report.py) refuses what is no report; here
are the claims that cannot both come from one run: a PASS whose own number is above its own limit,
an outcome that its checks do not come to, a deployed path that lists differences. It follows from
verdict.py and checks.py what can be said, and only what always holds there is asked for; numbers
that are left out contradict nothing here, a policy's limits and required checks ask for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tpcheck.deployment_gate.cells import is_refusal_as_planned
from tpcheck.deployment_gate.numbers import shown, size
from tpcheck.deployment_gate.policy import BACKENDS
from tpcheck.records import FAIL, OUTCOME_OF, PASS, SKIPPED, Check, Report, Verdict, worst

_HELD = {
    "structural": (("relative_rms", "limit"),),
    "drift": (("ratio", "limit"),),
    "allclose": (("required_atol", "atol"),),
    "decode": (("relative_rms", "limit"),),
}
"""Check -> (number, limit): where both stand in a check that is PASS, the first is not above."""

_NEVER_DEPLOYED = ("sim", "nccl-loopback")
_ON_GPUS = ("nccl", "nccl-loopback")


def contradictions(report: Report) -> list[str]:
    """Return every contradiction in a report, each as one sentence."""
    found = list(_of_path(report))
    for verdict in report.verdicts:
        where = f"{verdict.case_id} tp={verdict.tp_size} {verdict.dtype}"
        found += [f"{where}: {text}" for text in _of_verdict(verdict)]
    return found


def _of_path(report: Report) -> Iterator[str]:
    path = report.path
    if path.same_as_deployed and path.differences:
        yield f"the path is the deployed one, but differs from it: {path.differences[0]}"
    if path.same_as_deployed and path.backend in _NEVER_DEPLOYED:
        yield f"the path is the deployed one, but {path.backend} is no path that is deployed"
    backend = report.environment.get("backend", path.backend)
    if backend != path.backend:
        yield f"path.backend={path.backend!r}, but environment.backend={shown(backend)}"
    device = report.environment.get("device", "cuda")
    if path.backend in _ON_GPUS and not (isinstance(device, str) and device.startswith("cuda")):
        yield f"path.backend={path.backend!r}, but environment.device={shown(device)}"
    version = report.environment.get("tpcheck", report.tpcheck)
    if version != report.tpcheck:
        yield f"tpcheck={report.tpcheck!r}, but environment.tpcheck={shown(version)}"
    arguments = (report.engine or {}).get("arguments")
    told = arguments.get("backend", path.backend) if isinstance(arguments, Mapping) else None
    if isinstance(told, str) and told != path.backend and told in BACKENDS:
        yield f"path.backend={path.backend!r}, but engine.arguments.backend={shown(told)}"
    if path.same_as_deployed and (report.reduction or {}).get("basis") == "emulated":
        yield "the path is the deployed one, but its reduction was emulated"
    for name, count in path.collectives.items():
        if count < 0:
            yield f"path.collectives.{name}={count}, but should be at least 0"


def _of_verdict(verdict: Verdict) -> Iterator[str]:
    if verdict.tp_size < 1:
        yield "the degree should be at least 1"
    for name, check in verdict.checks.items():
        if check.outcome == PASS:
            yield from _of_pass(name, check)
    failed = [name for name, check in verdict.checks.items() if _decides(name, check)]
    unknown = [name for name in failed if name not in OUTCOME_OF]
    if unknown:
        yield f"check {unknown[0]} is FAIL, and this tpcheck does not know what it means"
    elif verdict.outcome not in (expected := _outcomes(verdict, failed)):
        yield f"outcome is {verdict.outcome}, but its checks come to {' or '.join(expected)}"


def _of_pass(name: str, check: Check) -> Iterator[str]:
    if check.facts.get("overflow"):
        yield f"check {name} is PASS, but overflows"
    for number, limit in _HELD.get(name, ()):
        if number not in check.facts:
            continue
        value, bound = size(check.facts[number]), size(check.facts.get(limit))
        if value is None:
            found = shown(check.facts[number])
            yield f"check {name} is PASS, but {number}={found}, which is no size"
        elif limit in check.facts and bound is None:
            yield f"check {name} is PASS, but {limit}={shown(check.facts[limit])}"
        elif bound is not None and value > bound:
            yield f"check {name} is PASS, but {number}={shown(value)} is above {shown(bound)}"


def _outcomes(verdict: Verdict, failed: list[str]) -> tuple[str, ...]:
    """Return the outcomes that a verdict's checks can come to."""
    if failed:
        found = worst([OUTCOME_OF[name] for name in failed])
        # an illegal degree that the subject accepted is WRONG
        return ("ILLEGAL", "WRONG") if failed == ["plan"] else (found,)
    if is_refusal_as_planned(verdict):
        return (PASS,)
    compared = [verdict.checks[name] for name in ("structural", "drift") if name in verdict.checks]
    return (PASS,) if any(one.outcome != SKIPPED for one in compared) else ("INCONCLUSIVE",)


def _decides(name: str, check: Check) -> bool:
    if name != "allclose" or check.outcome != FAIL:
        return check.outcome == FAIL
    # one at the derived tolerance decides nothing; a user's does, whoever says it does not
    return check.facts.get("decides") is True or not _is_derived(check)


def _is_derived(check: Check) -> bool:
    source = check.facts.get("source")
    return isinstance(source, str) and source.startswith("derived")
