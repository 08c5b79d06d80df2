"""`tp_check`: a subject in a test, and a search over subjects in a property.

Requirement: a property costs milliseconds an example and is never judged by simulation alone.
Inside `@given` examples run on simulated ranks; when the test is over, its minimal failing example,
or a set share of its passing ones, is run again on the real ranks, and a disagreement is a failure
that says so. That is done after Hypothesis, not inside an example, because real ranks take longer
than a deadline allows and would be asked again at every step of shrinking.

[Failures Apart] Hypothesis takes failures that were raised on one line for the same bug, and would
shrink a WRONG into an ILLEGAL of a smaller shape. So each outcome is raised on a line of its own.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NoReturn

from tpcheck.errors import BackendError, CheckFailed, TPCheckError
from tpcheck.plugin.session import TPPool, require_known
from tpcheck.records import FAIL, PASS, Report, Verdict
from tpcheck.render.text import render_text
from tpcheck.report import to_json
from tpcheck.repro.verdicts import script_of
from tpcheck.subjects import SubjectRef, make_ref

RERUN_EVERY = 25
"""Of the passing examples of a property the first and then every 25th run on real ranks: four of
Hypothesis's hundred, about as long as the search itself."""

_ATTEMPT = "_tpcheck_attempt"


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What ran, with which options, and what came of it.

    simulated: it was a search, which real ranks have yet to confirm. caller: where it stood, with
    the arguments that were drawn for it.
    """

    ref: SubjectRef
    options: Mapping[str, Any]
    report: Report
    simulated: bool = False
    caller: str = ""


class TPCheck:
    """`tp_check(build, **options)`: raises CheckFailed with the text report unless PASS."""

    def __init__(self, pool: TPPool, records: list[str]) -> None:
        self._pool = pool
        self._records = records
        self.begin()

    def __repr__(self) -> str:
        return "tp_check"

    def begin(self) -> None:
        """Forget the examples of the test before."""
        self._searched = 0
        self._passed = 0
        self._needs_ranks = False
        self._share: list[_Attempt] = []

    def __call__(self, build: str | Callable[..., Any], /, **options: Any) -> Report:
        """Return the Report of a subject that is the same function at every degree.

        Args:
            build: what `tpcheck.run` takes: a subject's name or a callable `build(tp)`.
            options: those of `tpcheck.run`; `tp_sizes` are the degrees of `--tp` by default.

        Raises:
            CheckFailed: any outcome but PASS; the message is the whole text report.
            TPCheckError: an option, the subject or the backend is unusable.
        """
        __tracebackhide__ = True
        in_property = _in_hypothesis()
        try:
            require_known(options)
            ref = make_ref(build)
            if in_property:
                attempt = self._example(ref, options, sys._getframe(1))
            else:
                attempt = _Attempt(ref, options, self._pool.run(ref, **options))
        except TPCheckError as error:
            # a user's mistake is told in one sentence; how tpcheck came to it is no help
            raise error.with_traceback(None) from None
        if not in_property:
            self._record(attempt.report)
        if attempt.report.outcome == PASS:
            return attempt.report
        failure = CheckFailed(render_text(attempt.report))
        if in_property:
            setattr(failure, _ATTEMPT, attempt)  # explained when Hypothesis has the smallest
        else:
            _explain(failure, attempt)
        _raise_apart(attempt.report.outcome, failure)

    def finish(self, error: Exception | None) -> None:
        """Hold a property that is over against real ranks.

        Args:
            error: what the test raised. Every failing example in it gets a note on what real ranks
                say; without one, the kept share of passing examples runs on them.

        Raises:
            CheckFailed: an example passes in simulation only.
        """
        __tracebackhide__ = True
        if self._searched:
            self._records.append(json.dumps({"searched": self._searched, "report": None}))
        for failure in _leaves(error):
            attempt: _Attempt | None = getattr(failure, _ATTEMPT, None)
            if attempt is not None:
                delattr(failure, _ATTEMPT)
                self._confirm(failure, attempt)
        for attempt in self._share if error is None else ():
            self._rerun(attempt)

    def _rerun(self, attempt: _Attempt) -> None:
        """Run an example that passed on real ranks."""
        __tracebackhide__ = True
        if not attempt.simulated:
            self._record(attempt.report)
            return
        real = self._pool.run(attempt.ref, **attempt.options)
        self._record(real)
        if real.outcome != PASS:
            where = f"{self._pool.backend} at tp={_smallest(real).tp_size}"
            line = _ONLY_ON_REAL_RANKS.format(real.outcome, where, attempt.caller)
            failure = CheckFailed(f"{line}\n{render_text(real)}")
            _explain(failure, replace(attempt, report=real))
            raise failure

    def _example(self, ref: SubjectRef, options: Mapping[str, Any], caller: FrameType) -> _Attempt:
        """Judge one example where that is fast: in simulation, if the subject runs there."""
        options = {"cases": 1, "confirm": False, **options}
        if self._needs_ranks or "backend" in options:
            attempt = _Attempt(ref, options, self._pool.run(ref, **options))
        else:
            try:
                report = self._pool.run(ref, **options, backend="sim")
            except BackendError:
                if self._pool.backend == "sim":
                    raise
                self._needs_ranks = True  # process_group and mesh are lent by real ranks only
                return self._example(ref, options, caller)
            attempt = _Attempt(ref, options, report, simulated=self._pool.backend != "sim")
            self._searched += 1
        if attempt.report.outcome == PASS:
            if self._passed % RERUN_EVERY == 0:
                self._share.append(replace(attempt, caller=_arguments(caller)))
            self._passed += 1
        return attempt

    def _confirm(self, failure: BaseException, attempt: _Attempt) -> None:
        """Note on a failing example what real ranks say of it, and record what stands."""
        standing, confirmed = attempt.report, True
        if attempt.simulated:
            note, standing = self._on_real_ranks(attempt)
            confirmed = standing is not attempt.report
            failure.add_note(note)
        elif self._pool.backend == "sim":
            failure.add_note("in simulation only: --tp-backend sim leaves out real ranks")
        self._record(standing)
        _explain(failure, attempt, script=confirmed)

    def _on_real_ranks(self, attempt: _Attempt) -> tuple[str, Report]:
        """Return what real ranks say of a failing example, and the report that stands."""
        worst = _smallest(attempt.report)
        where = f"{self._pool.backend} at tp={worst.tp_size}"
        try:
            real = self._pool.run(attempt.ref, **{**attempt.options, "tp_sizes": (worst.tp_size,)})
        except TPCheckError as error:
            return f"not confirmed, {where} could not be run: {error}", attempt.report
        if real.outcome == worst.outcome:
            return f"confirmed on {where}", real
        if real.outcome == PASS:
            return _ONLY_IN_SIMULATION.format(worst.outcome, where), attempt.report
        return f"fails on {where} too, but as {real.outcome}", real

    def _record(self, report: Report) -> None:
        self._records.append(json.dumps({"searched": 0, "report": to_json(report)}))


_ONLY_IN_SIMULATION = (
    "simulation and real ranks disagree: {} in simulation, PASS on {}: the subject shares process"
    " state between ranks (a global, a cache, a default), of which real ranks have one each"
)
_ONLY_ON_REAL_RANKS = (
    "simulation and real ranks disagree: PASS in simulation, {} on {} [{}]: the subject"
    " depends on what only real ranks have (a process's environment or state), or their collectives"
    " are not what simulation emulates"
)


def _smallest(report: Report) -> Verdict:
    """Return the failing verdict of the smallest degree."""
    failing = [verdict for verdict in report.verdicts if verdict.outcome != PASS]
    return min(failing, key=lambda verdict: verdict.tp_size)


def _explain(failure: BaseException, attempt: _Attempt, *, script: bool = True) -> None:
    """Note on a failure its smallest degree and rank, and a script that shows it."""
    verdict = _smallest(attempt.report)
    rank = _rank(verdict)
    where = f"tp={verdict.tp_size}" if rank is None else f"tp={verdict.tp_size}, rank {rank}"
    failure.add_note(f"smallest failing degree: {where}")
    text = (verdict.script or script_of(attempt.ref, verdict)) if script else ""
    if text and text not in str(failure):
        failure.add_note(f"standalone repro (needs torch only):\n\n{text}")


def _rank(verdict: Verdict) -> int | None:
    """Return the rank that diverges first, or that a failed check names."""
    first = verdict.first_divergence
    named = [check.facts.get("rank") for check in verdict.checks.values() if check.outcome == FAIL]
    ranks = [first.rank if first is not None else None, *named]
    return next((rank for rank in ranks if isinstance(rank, int)), None)


def _raise_apart(outcome: str, error: CheckFailed) -> NoReturn:
    """Raise each outcome on a line of its own: [Failures Apart]."""
    __tracebackhide__ = True
    match outcome:
        case "WRONG":
            raise error
        case "ERROR":
            raise error
        case "DRIFT":
            raise error
        case "ILLEGAL":
            raise error
        case _:
            raise error


def _leaves(error: BaseException | None) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    elif error is not None:
        yield error


def _arguments(frame: FrameType) -> str:
    """Return a call as it could be written: `test_layer(hidden=8, tp_size=2)`."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = [f"{name}={reprlib.repr(frame.f_locals.get(name))}" for name in names]
    return f"{code.co_name}({', '.join(given)})"


def _in_hypothesis() -> bool:
    hypothesis = sys.modules.get("hypothesis")
    return hypothesis is not None and bool(hypothesis.currently_in_test_context())
