"""Search generated cases for one that fails, and shrink it: Hypothesis does both.

Requirement: what a person gets to read is the smallest case that still fails in the same way, and a
failure found once is the first thing tried the next time. A search knows nothing of ranks: it is
given a strategy of cases and a function that judges one, smallest degree first.

[Same Way] A case may be shrunk into another bug. So the first failure fixes the outcome and the
check that leads it, and a smaller case counts only if both are the same.
[Remembered Cases] Kept as their ids, the smallest ones only, because Hypothesis keeps no choices of
a seeded search, and an id still means the same after the strategy has changed.
[Shrinking Ends] After SHRINK_S seconds no new case is judged; those already judged keep their
answer, so that Hypothesis finds its best example failing as before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import SubjectError, TPCheckError
from tpcheck.records import CHECK_NAMES, FAIL, PASS, Verdict
from tpcheck.spec import Case

SHRINK_S = 60.0
"""A person waits for the smallest case; a smaller one is not worth a second minute."""

Judge = Callable[[Case], Sequence[Verdict]]
"""A case's verdicts, ending with the first that is not PASS."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    passed: verdicts of the cases that passed before anything failed, in order. failing: the
    smallest failing case, None when nothing failed. first: its larger ancestor, as it was drawn.
    tried: how many cases were judged, shrinking included. shrink_s: seconds it took. remembered:
    the failing case was found by an earlier search [Remembered Cases].
    """

    passed: tuple[Verdict, ...]
    failing: Case | None = None
    first: Case | None = None
    tried: int = 0
    shrink_s: float = 0.0
    remembered: bool = False


def search(
    cases: Any,
    judge: Judge,
    *,
    limit: int,
    seed: int,
    key: str,
    known: frozenset[str] = frozenset(),
    database: Any = None,
) -> Found:
    """Judge up to `limit` cases drawn from a strategy; shrink the first that fails.

    Args:
        key: names the subject in the database of failures.
        known: ids of failing cases that are no news.
        database: a Hypothesis example database; by default the one in `.hypothesis`.

    Raises:
        SubjectError: nothing can be drawn from the strategy.
        TPCheckError: whatever `judge` raises of that kind.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase

    store = database or hypothesis.settings.get_profile("default").database
    name = f"tpcheck/{key}".encode()
    hunt = _Hunt(judge, known)
    failing = _remembered(hunt, store, name)
    remembered = failing is not None
    if failing is None and hunt.mistake is None:
        settings = hypothesis.settings(
            max_examples=limit,
            deadline=None,
            derandomize=False,
            database=None,  # [Remembered Cases]
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        try:
            failing = hypothesis.find(
                cases, hunt.fails, settings=settings, random=random.Random(seed)
            )
        except hypothesis.errors.NoSuchExample:
            pass
        except hypothesis.errors.HypothesisException as error:
            raise SubjectError(f"specs={cases!r} cannot be drawn from: {error}") from error
    if hunt.mistake is not None:
        raise hunt.mistake
    if failing is not None and store is not None:
        store.save(name, failing.id.encode())
    return Found(tuple(hunt.passed), failing, hunt.first, hunt.tried, hunt.shrink_s, remembered)


def _remembered(hunt: _Hunt, store: Any, name: bytes) -> Case | None:
    """Return a remembered case that still fails; forget those that do not."""
    for stored in sorted(store.fetch(name)) if store is not None else ():
        try:
            case = Case.parse(stored.decode())
        except (TPCheckError, UnicodeDecodeError):
            store.delete(name, stored)
            continue
        if hunt.fails(case):
            return case
        if hunt.mistake is None and case.id not in hunt.known:
            store.delete(name, stored)
    return None


class _Hunt:
    """The condition that Hypothesis searches and shrinks under."""

    def __init__(self, judge: Judge, known: frozenset[str]) -> None:
        self._judge = judge
        self.known = known
        self._kind: tuple[str, str] | None = None
        self._answers: dict[str, bool] = {}
        self._failed_at = 0.0
        self.passed: list[Verdict] = []
        self.first: Case | None = None
        self.tried = 0
        self.mistake: TPCheckError | None = None
        self.shrink_s = 0.0

    def fails(self, case: Case) -> bool:
        if self.mistake is not None or case.id in self.known:
            return False
        if case.id not in self._answers:
            if self.first is not None:
                self.shrink_s = time.monotonic() - self._failed_at
                if self.shrink_s > SHRINK_S:
                    return False  # [Shrinking Ends]
            self._answers[case.id] = self._judged(case)
        return self._answers[case.id]

    def _judged(self, case: Case) -> bool:
        self.tried += 1
        try:
            verdicts = self._judge(case)
        except TPCheckError as error:
            self.mistake = error  # of the subject or the options: no smaller case says it better
            return False
        kind = failure_kind(verdicts[-1])
        if self._kind is None:
            if kind is None:
                self.passed += verdicts
                return False
            self._kind, self.first, self._failed_at = kind, case, time.monotonic()
        return kind == self._kind


def failure_kind(verdict: Verdict) -> tuple[str, str] | None:
    """Return what makes two failures the same: the outcome and the check that leads it.

    None for a verdict that is PASS.
    """
    if verdict.outcome == PASS:
        return None
    failed = [
        name
        for name in CHECK_NAMES
        if name in verdict.checks and verdict.checks[name].outcome == FAIL
    ]
    return verdict.outcome, failed[0] if failed else ""
