"""How a simulated job fails, in words: ranks that disagree, a rank that raised, one that hung.

Requirement: the message alone names every rank and the call it stands in, equal ranks together:
`ranks 0-2 wait in all_reduce([4, 64] bfloat16, sum) (#5), rank 3 in all_gather(...) (#5)`.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

from tpcheck.errors import ScheduleError
from tpcheck.groups.jobs import in_seconds, text_of
from tpcheck.trace import Collective, RankFailure

_REPEAT_S = 1.0
_SHOWN_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a rank stands: waiting in `call` at `frame`, or not waiting at all."""

    rank: int
    call: Collective | None = None
    frame: FrameType | None = None


class RankHung(BaseException):
    """Raised inside the running rank when time is up; nothing but the session catches it."""


class Alarm:
    """Interrupt the running rank after `seconds`, and again every second if it swallows that.

    Armed only in the main thread, and only if nobody else uses the timer. It never fires between
    ranks: `running` is the rank on the processor, None while the session itself works.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running: int | None = None
        self.hung: int | None = None
        self.stack = ""
        self._armed = False

    def __enter__(self) -> Alarm:
        free = threading.current_thread() is threading.main_thread()
        if free and self.seconds > 0 and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            self._previous = signal.signal(signal.SIGALRM, self._fire)
            signal.setitimer(signal.ITIMER_REAL, self.seconds, _REPEAT_S)
            self._armed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._previous)
            self._armed = False

    def _fire(self, number: int, frame: FrameType | None) -> None:
        if self.running is None:
            return
        if self.hung is None:
            self.hung, self.stack = self.running, _stack(frame)
        raise RankHung


def schedule_failure(standings: Sequence[Standing]) -> RankFailure:
    """Return the failure of ranks that do not all wait in the same collective."""
    text = describe_standings(standings)
    return RankFailure(
        kind="schedule",
        message=text,
        rank=_outvoted(standings),
        exception_type="ScheduleError",
        exception=ScheduleError(text),
        in_flight=_in_flight(standings),
        stacks={s.rank: _stack(s.frame) for s in standings if s.frame is not None},
    )


def raised_failure(rank: int, error: BaseException, standings: Sequence[Standing]) -> RankFailure:
    """Return the failure of a rank that raised; the error's frames are let go, its text stays."""
    kind = type(error).__name__
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    lines = traceback.format_exception(error.with_traceback(trace))
    link: BaseException | None = error
    while link is not None and link.__traceback__ is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    summary = text_of(error).strip().partition("\n")[0]
    return RankFailure(
        kind="raised",
        message=f"rank {rank} raised {kind}: {summary}"
        if summary
        else f"rank {rank} raised {kind}",
        rank=rank,
        exception_type=kind,
        exception=error,
        traceback="".join(lines),
        in_flight=_in_flight(standings),
    )


def hung_failure(standings: Sequence[Standing], alarm: Alarm, timeout_s: float) -> RankFailure:
    """Return the failure of a rank that did not come back in time."""
    assert alarm.hung is not None
    waiting = [s for s in standings if s.call is not None]
    others = f"; {describe_standings(waiting)}" if waiting else ""
    stacks = {s.rank: _stack(s.frame) for s in waiting}
    return RankFailure(
        kind="hung",
        message=f"rank {alarm.hung} did not return within {in_seconds(timeout_s)}{others}",
        rank=alarm.hung,
        in_flight=_in_flight(standings),
        stacks={**stacks, alarm.hung: alarm.stack},
    )


def describe_standings(standings: Sequence[Standing]) -> str:
    """Say where every rank stands, equal ranks together, in order of their lowest rank."""
    groups: dict[str, list[int]] = {}
    for standing in standings:
        groups.setdefault(_where(standing), []).append(standing.rank)
    phrases: list[str] = []
    for where, ranks in list(groups.items())[:_SHOWN_GROUPS]:
        plural = len(ranks) > 1
        if not where:
            phrases.append(f"{_ranks(ranks)} {'have' if plural else 'has'} returned")
        elif any(" in " in phrase for phrase in phrases):
            phrases.append(f"{_ranks(ranks)} in {where}")
        else:
            phrases.append(f"{_ranks(ranks)} {'wait' if plural else 'waits'} in {where}")
    hidden = sum(len(ranks) for ranks in list(groups.values())[_SHOWN_GROUPS:])
    return ", ".join(phrases) + (f" and {hidden} more ranks elsewhere" if hidden else "")


def _where(standing: Standing) -> str:
    call = standing.call
    return f"{call.describe()} (#{call.sequence})" if call else ""


def _ranks(ranks: Sequence[int]) -> str:
    """Write sorted ranks as `rank 3` or `ranks 0-2,5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"ranks {text}" if len(ranks) > 1 else f"rank {text}"


def _outvoted(standings: Sequence[Standing]) -> int | None:
    """Return the lowest rank outside the group that more than half of the ranks are in."""
    groups: dict[object, list[int]] = {}
    for standing in standings:
        key = standing.call.signature() if standing.call else None
        groups.setdefault(key, []).append(standing.rank)
    largest = max(groups.values(), key=len)
    if 2 * len(largest) <= len(standings):
        return None
    return min(rank for ranks in groups.values() if ranks is not largest for rank in ranks)


def _in_flight(standings: Sequence[Standing]) -> dict[int, str]:
    return {s.rank: f"#{s.call.sequence} {s.call.describe()}" for s in standings if s.call}


def _stack(frame: FrameType | None) -> str:
    return "".join(traceback.format_stack(frame)) if frame is not None else ""
