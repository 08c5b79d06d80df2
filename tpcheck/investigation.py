"""One case in one dtype: which runs it takes to know, and the evidence they give.

Requirement: most cases need four runs (TP=1 and TP=N, in float64 and in the deployed dtype). More
are made only when a number needs an explanation: the noise floor of hard casts, routing pinned to
the reference, the drift this case's own partials explain, the module that diverges first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck.case_runs import CaseRuns
from tpcheck.checks import drift_alone, run_checks
from tpcheck.conduct import loading_remarks
from tpcheck.divergence import first_divergence
from tpcheck.evidence import Evidence, routing_flips
from tpcheck.explanations import explained
from tpcheck.groups.jobs import Ranks
from tpcheck.numerics.drift import expected_ratio
from tpcheck.numerics.tolerance import Tolerance
from tpcheck.records import Check, FirstDivergence
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectRef
from tpcheck.trace import Trace


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every case of a run."""

    tp_sizes: tuple[int, ...]
    tolerance: Tolerance | None = None
    timeout_s: float = 120.0
    until: str = ""
    reduction: str = "ring"
    confirm: bool = True
    locate: bool = True


@dataclass(frozen=True, slots=True)
class Findings:
    """What one (case, degree, dtype) came to."""

    checks: Mapping[str, Check]
    first_divergence: FirstDivergence | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    collectives: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Investigation:
    """Runs one case of a subject in one deployed dtype, at any number of degrees."""

    def __init__(
        self,
        ranks: Ranks,
        ref: SubjectRef,
        subject: Subject,
        case: Case,
        dtype: str,
        settings: Settings,
    ) -> None:
        self._settings = settings
        tp_sizes, timeout_s = settings.tp_sizes, settings.timeout_s
        self._runs = CaseRuns(ranks, ref, subject, case, dtype, tp_sizes, timeout_s)

    @property
    def runs(self) -> CaseRuns:
        """The runs of this case: TP=1's are made once for whoever asks."""
        return self._runs

    def findings(self, tp_size: int) -> Findings:
        """Run what it takes at one degree and return every check.

        Raises:
            JobFailed: a rank raised, died or hung; the failure says which and where.
        """
        evidence, notes = self.evidence(tp_size)
        checks = run_checks(evidence)
        divergence, more = self._where(evidence, checks)
        counts = checks["schedule"].facts.get("per_forward", {})
        facts = evidence.deployed[0].facts
        remarks = (*notes, *more, *drift_alone(checks), *loading_remarks(evidence.base))
        return Findings(checks, divergence, facts, counts, remarks)

    def evidence(self, tp_size: int) -> tuple[Evidence, tuple[str, ...]]:
        """Return what `findings` judges, and notes on how it came about. Raises as it does."""
        runs = self._runs
        runs.start_clock()
        oracle, base = runs.oracle, runs.base
        runs.start_clock()
        exact, deployed = runs.at_degree(tp_size)
        evidence = Evidence(
            dtype=runs.dtype,
            tp_size=tp_size,
            base=base,
            deployed=deployed,
            oracle=oracle,
            exact=exact,
            oracle_dtype=runs.oracle_dtype or runs.dtype,
            expected=self._planned_ratio(tp_size),
            expected_source=f"{self._settings.reduction} of {tp_size} equal, independent partials",
            base_error=runs.base_error_without_oracle,
            quantization_error=runs.quantization_error,
            tolerance=self._settings.tolerance,
            logits=runs.subject.options.logits,
            **self._routing(deployed),
        )
        evidence, notes = explained(runs, evidence, self._settings.reduction)
        return evidence, (*runs.notes, *notes)

    def _planned_ratio(self, tp_size: int) -> float:
        ratio = expected_ratio(tp_size, self._settings.reduction)
        # Without an oracle the reference carries TP=1's own error as well.
        return ratio if self._runs.oracle is not None else math.sqrt(1 + ratio**2)

    def _routing(self, deployed: Sequence[Trace]) -> dict[str, Any]:
        if not self._runs.pinned:
            return {}
        flips, margin = routing_flips(deployed[0].extras["choices"], self._runs.pinned)
        pinned = all(trace.extras["unpinned"] == 0 for trace in deployed)
        return {
            "routing_flips": flips,
            "routing_margin": margin if flips else None,
            "routing_pinned": pinned,
        }

    def _where(
        self, evidence: Evidence, checks: Mapping[str, Check]
    ) -> tuple[FirstDivergence | None, tuple[str, ...]]:
        if not self._settings.locate:
            return None, ()
        runs, task = self._runs, replace(self._runs.task, until=self._settings.until)
        return first_divergence(task, runs.run, evidence, checks, runs.oracle_dtype)
