"""The script of a verdict: which ones have one, and never a failure of its own."""

from __future__ import annotations

from tpcheck.records import Verdict
from tpcheck.repro.scripts import repro_script
from tpcheck.spec import Case
from tpcheck.subjects import SubjectRef


def script_of(ref: SubjectRef, verdict: Verdict) -> str:
    """Return the script that shows a failing verdict with torch alone, or "" where none does.

    A refused degree has nothing to run, and a rank that hung or died would do so again.
    """
    schedule = verdict.checks.get("schedule")
    kind = schedule.facts.get("kind") if schedule is not None else None
    if verdict.outcome not in ("WRONG", "DRIFT", "ERROR") or kind in ("hung", "died"):
        return ""
    case, first = Case.parse(verdict.case_id), verdict.first_divergence
    try:
        return repro_script(
            ref,
            tp_size=verdict.tp_size,
            seed=case.seed,
            dtype=verdict.dtype,
            batch=case.batch,
            seq_len=case.seq_len,
            spec=case.spec,
            fqn="" if first is None else first.fqn,
        )
    except Exception:  # it runs the subject once more, and the failure is reported all the same
        return ""
