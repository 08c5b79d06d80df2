"""Generated cases: searched on simulated ranks, shrunk, and held against real ones.

Requirement: a subject that takes specs is searched where a case costs milliseconds, and no verdict
rests on simulation alone: the smallest failing case and every CONFIRM_EVERY-th passing one run
again on real processes. A disagreement between the two is itself a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tpcheck.groups.jobs import Ranks
from tpcheck.investigation import Settings
from tpcheck.judging import CaseJudge, Seen
from tpcheck.records import PASS, Verdict
from tpcheck.repro.verdicts import script_of
from tpcheck.run_plan import RunPlan
from tpcheck.search import Found, search
from tpcheck.spec import Case
from tpcheck.strategies import generated_cases
from tpcheck.subjects import DEFAULT_SEQ_LEN

CONFIRM_EVERY = 25
"""The first passing case and every 25th: a case on real ranks costs as much as ten simulated."""

Progress = Callable[[int, int, str], None]


def generated_verdicts(
    plan: RunPlan, ranks: Ranks, seen: Seen, progress: Progress | None
) -> Iterator[Verdict]:
    """Yield the verdicts of passing cases, then each failure's smallest case.

    Stops at the first failure, or after `plan.max_failures`.
    """
    options = plan.subject.options
    strategy = generated_cases(
        options.specs,
        longest=options.seq_len or DEFAULT_SEQ_LEN,
        batch=plan.batch,
        seq_len=plan.seq_len,
    )
    known: set[str] = set()
    shown: set[tuple[str, int, str]] = set()
    left = plan.limit
    while left > 0 and len(known) < (plan.max_failures or 1):
        trial = _Trial(plan, ranks, seen, progress, start=plan.limit - left)
        found = search(
            strategy,
            trial.verdicts,
            limit=left,
            seed=plan.seed + len(known),
            key=plan.ref.label,
            known=frozenset(known),
        )
        for verdict in found.passed:
            key = (verdict.case_id, verdict.tp_size, verdict.dtype)
            if key not in shown:
                shown.add(key)
                yield verdict
        if found.failing is None:
            return
        known.add(found.failing.id)
        left -= trial.passed + 1
        yield trial.smallest(found.failing, found)


class _Trial:
    """Judges cases at every degree and dtype of a plan, smallest degree first."""

    def __init__(
        self, plan: RunPlan, ranks: Ranks, seen: Seen, progress: Progress | None, start: int
    ) -> None:
        self._plan = plan
        self._ranks = ranks
        self._seen = seen
        self._progress = progress
        self._start = start
        self._failed: Verdict | None = None
        self.passed = 0

    def verdicts(self, case: Case) -> list[Verdict]:
        """Return the case's verdicts, up to the first that is not PASS."""
        if self._progress is not None:
            text = (
                "shrinking"
                if self._failed is not None
                else f"s{case.seed}-b{case.batch}-t{case.seq_len}"
            )
            self._progress(self._start + self.passed, self._plan.limit, text)
        settings = replace(self._plan.settings, locate=False)
        judges = self._judges(case, settings)
        confirm = self._confirms
        made: list[Verdict] = []
        for tp_size in self._degrees:
            for judge in judges:
                verdict = judge.verdict(tp_size)
                if confirm and verdict.outcome == PASS:
                    verdict = judge.against_real_ranks(verdict)
                made.append(verdict)
                if verdict.outcome != PASS:
                    self._failed = verdict
                    return made
        self.passed += self._failed is None
        return made

    @property
    def _degrees(self) -> list[int]:
        """Ascending; once something failed, what only a larger degree shows is no smaller case."""
        sizes = self._plan.tp_sizes
        largest = max(sizes) if self._failed is None else self._failed.tp_size
        return sorted(size for size in sizes if size <= largest)

    @property
    def _confirms(self) -> bool:
        simulated = self._ranks.label == "sim" and self._plan.settings.confirm
        return simulated and self._failed is None and self.passed % CONFIRM_EVERY == 0

    def smallest(self, case: Case, found: Found) -> Verdict:
        """Return the failing verdict of the smallest case, located and confirmed."""
        failing = self.verdicts(case)[-1]
        (judge,) = (
            judge
            for judge in self._judges(case, self._plan.settings)
            if judge.dtype == failing.dtype
        )
        verdict = judge.confirmed(failing.tp_size)
        note = f"smallest of {found.tried} cases tried"
        if found.remembered:
            note = "remembered from an earlier run (delete .hypothesis to forget)"
        elif found.first is not None and found.first != case:
            note += f", shrunk from {found.first.id}"
        script = script_of(self._plan.ref, verdict)
        return replace(verdict, reasons=(*verdict.reasons, note), script=script)

    def _judges(self, case: Case, settings: Settings) -> list[CaseJudge]:
        return [
            CaseJudge(self._plan, self._ranks, case, dtype, self._seen, settings)
            for dtype in self._plan.dtypes
        ]
