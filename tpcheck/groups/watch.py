"""One job in progress: what its ranks answered, and why it should not be waited for any longer.

Requirement: a rank that raises, dies or hangs becomes one RankFailure that names the rank to blame
and what every other rank was doing, well before the caller's patience ends. A mismatch is visible
while it happens: two ranks that stay in different collectives at the same position, or one that
waits in a collective which another rank has already ended without.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Sequence

from tpcheck.errors import ScheduleError
from tpcheck.groups import wire
from tpcheck.groups.fleet import Link
from tpcheck.groups.flight import Flight, innermost_frame, rank_list
from tpcheck.groups.jobs import Job, JobResult, in_seconds
from tpcheck.trace import RankFailure

STABLE_S = 1.0
"""How long ranks may sit in collectives that do not fit before it is called a mismatch."""
GRACE_S = 5.0
"""How long the others may compute after a rank failed, to tell what they would have said."""


class Watch:
    """Follows one job. Feed it with `take` and `look`, then ask `over` and `stop_reason`."""

    def __init__(
        self, *, number: int, index: int, job: Job, links: Sequence[Link], now: float
    ) -> None:
        self.number = number
        self.index = index
        self.job = job
        self.links = list(links)
        self.replies: dict[int, wire.Reply] = {}
        self.deaths: dict[int, str] = {}
        self.stacks: dict[int, str] = {}
        self._deadline = now + job.timeout_s
        self._seen: dict[int, tuple[Flight, float]] = {}
        self._failed_at: float | None = None
        self._arrivals: list[int] = []

    @property
    def pending(self) -> list[int]:
        ranks = range(self.job.size)
        return [rank for rank in ranks if rank not in self.replies and rank not in self.deaths]

    @property
    def over(self) -> bool:
        return len(self.replies) + len(self.deaths) == self.job.size

    @property
    def succeeded(self) -> bool:
        kinds = [reply.kind for reply in self.replies.values()]
        return kinds == ["returned"] * self.job.size

    def take(self, rank: int, reply: wire.Reply, now: float) -> None:
        """Note a rank's answer; answers to earlier jobs are dropped."""
        if reply.job != self.number:
            return
        self.replies[rank] = reply
        # what was seen before it answered, it is in no more
        self._seen[rank] = (self.links[rank].flight(), now)
        if reply.kind != "returned":
            self._fail(rank, now)

    def bury(self, rank: int, death: str, now: float) -> None:
        flight = self.links[rank].flight()
        if flight.job == self.number:  # it died before anybody looked
            self._seen[rank] = (flight, now)
        self.deaths[rank] = death
        self._fail(rank, now)

    def look(self, now: float) -> None:
        """Note what every pending rank is doing, and since when."""
        for rank in self.pending:
            flight = self.links[rank].flight()
            if flight.job == self.number and flight != self._flight(rank):
                self._seen[rank] = (flight, now)

    def stop_reason(self, now: float) -> str:
        """Return why the pending ranks need not be waited for: a RankFailure kind, or ""."""
        if now >= self._deadline:
            return "failed" if self._failed_at is not None else "hung"
        if self._failed_at is not None:
            since = max([self._failed_at, *(self._seen_since(rank) for rank in self.pending)])
            stuck = all(self._flight(rank).waits for rank in self.pending)
            if now - self._failed_at >= GRACE_S or (stuck and now - since >= STABLE_S):
                return "failed"
            return ""
        return "schedule" if self._clash(now) else ""

    def result(self, reason: str) -> JobResult:
        """Return the job's result; `reason` is that of `stop_reason`, "" if all ranks answered."""
        if not reason and self.succeeded:
            replies = [wire.unpack(self.replies[rank].value) for rank in range(self.job.size)]
            return JobResult(replies=tuple(replies))
        if reason == "schedule":
            return JobResult(failure=self._mismatch(self._waiting_text()))
        if reason == "hung":
            return JobResult(failure=self._hang())
        if self._calls_differ():  # a backend that is given two dtypes, say, ends a rank or raises
            return JobResult(failure=self._mismatch(self._calls_text()))
        return JobResult(failure=self._blame())

    def _fail(self, rank: int, now: float) -> None:
        self._arrivals.append(rank)
        if self._failed_at is None:
            self._failed_at = now

    def _flight(self, rank: int) -> Flight:
        return self._seen[rank][0] if rank in self._seen else Flight()

    def _seen_since(self, rank: int) -> float:
        return self._seen[rank][1] if rank in self._seen else 0.0

    def _clash(self, now: float) -> bool:
        """Return whether ranks wait, and have for a while, for something that cannot come."""
        steady = {
            rank: flight
            for rank, (flight, since) in self._seen.items()
            if now - since >= STABLE_S and (rank in self.replies or flight.waits)
        }
        for rank, flight in steady.items():
            if rank in self.replies:
                continue
            place = (flight.generation, flight.sequence)
            for other, theirs in steady.items():
                if other in self.replies:
                    if (theirs.generation, theirs.sequence) < place:
                        return True
                elif (theirs.generation, theirs.sequence) == place and theirs.text != flight.text:
                    return True
        return False

    def _hang(self) -> RankFailure:
        pending = self.pending
        # Ranks in a collective wait for the others, so those that are in none are to blame.
        suspects = [rank for rank in pending if not self._flight(rank).waits] or pending
        verb = "did not return" if self.replies or len(suspects) < self.job.size else "returned"
        who = rank_list(suspects) if verb == "did not return" else "no rank"
        message = f"{who} {verb} within {in_seconds(self.job.timeout_s)}: {self._waiting_text()}"
        rank = suspects[0] if len(suspects) == 1 else None
        return self._failure("hung", message, rank)

    def _blame(self) -> RankFailure:
        """Find the first failure that is not merely the echo of another one."""
        own = [rank for rank in self._arrivals if not self._is_echo(rank)]
        rank = (own or self._arrivals)[0]
        if rank in self.deaths:
            return self._failure("died", f"rank {rank} {self.deaths[rank]}", rank)
        reply = self.replies[rank]
        said = f"{reply.exception_type}: {reply.message}".rstrip(": ")
        alike = [
            other
            for other, theirs in sorted(self.replies.items())
            if (theirs.kind, theirs.exception_type, theirs.message)
            == (reply.kind, reply.exception_type, reply.message)
        ]
        who = "every rank" if 1 < len(alike) == self.job.size else rank_list(alike)
        rank = alike[0]
        reply = self.replies[rank]
        message = f"{who} raised {said}"
        if reply.kind == "environment":
            message = f"{who} could not join a {self.job.size}-rank group: {said}"
        with contextlib.suppress(Exception):
            exception = pickle.loads(reply.exception) if reply.exception else None
            return self._failure(reply.kind, message, rank, reply, exception)
        return self._failure(reply.kind, message, rank, reply)

    def _mismatch(self, message: str) -> RankFailure:
        error = ScheduleError(message)
        return self._failure(
            "schedule", message, None, exception=error, exception_type="ScheduleError"
        )

    def _calls_differ(self) -> bool:
        """Return whether all ranks came as far, but not to the same call."""
        flights = [self._flight(rank) for rank in range(self.job.size)]
        places = {(flight.generation, flight.sequence) for flight in flights}
        return len(places) == 1 and len({flight.text for flight in flights}) > 1

    def _calls_text(self) -> str:
        groups: dict[str, list[int]] = {}
        for rank in range(self.job.size):
            flight = self._flight(rank)
            groups.setdefault(f"{flight.text} (#{flight.sequence})", []).append(rank)
        calls = ", ".join(f"{rank_list(ranks)} called {call}" for call, ranks in groups.items())
        return f"{calls}: {self._blame().message}"

    def _is_echo(self, rank: int) -> bool:
        reply = self.replies.get(rank)
        return reply is not None and bool(_LOST_PEER.search(reply.message))

    def _failure(
        self,
        kind: str,
        message: str,
        rank: int | None,
        reply: wire.Reply | None = None,
        exception: BaseException | None = None,
        exception_type: str = "",
    ) -> RankFailure:
        in_flight = {rank: self._flight(rank).describe() for rank in range(self.job.size)}
        tracebacks = {rank: reply.traceback for rank, reply in self.replies.items()}
        stacks = {**self.stacks, **{rank: text for rank, text in tracebacks.items() if text}}
        return RankFailure(
            kind=kind,
            message=message,
            rank=rank,
            exception_type=reply.exception_type if reply else exception_type,
            exception=exception,
            traceback=reply.traceback if reply else "",
            in_flight={rank: text for rank, text in in_flight.items() if text},
            stacks=dict(sorted(stacks.items())),
        )

    def _waiting_text(self) -> str:
        """Return `ranks 0-2 wait in all_reduce(...) (#5), rank 3 in all_gather(...) (#5)`."""
        groups: dict[str, list[int]] = {}
        for rank in range(self.job.size):
            groups.setdefault(self._doing(rank), []).append(rank)
        texts, waiting = [], False
        for doing, ranks in groups.items():
            verb = "waits in" if len(ranks) == 1 else "wait in"
            if doing.startswith("in "):
                texts.append(f"{rank_list(ranks)} {'in' if waiting else verb} {doing[3:]}")
                waiting = True
            else:
                texts.append(f"{rank_list(ranks)} {doing if len(ranks) == 1 else _plural(doing)}")
        return ", ".join(texts)

    def _doing(self, rank: int) -> str:
        flight = self._flight(rank)
        if rank in self.replies:
            count = flight.sequence + 1
            return f"returned after {count} collective{'' if count == 1 else 's'}"
        if flight.waits:
            return f"in {flight.text} (#{flight.sequence})"
        stack = self.stacks.get(rank, "")
        if not stack or stack.startswith(NO_STACK):
            return "is stopped: it writes no stack"
        return f"is in {innermost_frame(stack) or 'code without a Python frame'}"


NO_STACK = "no stack: "

_LOST_PEER = re.compile(
    r"connection (reset|closed|refused)|broken pipe|socket closed|gloo/transport"
    r"|remote process exited|ncclRemoteError|NCCL communicator was aborted|timed out waiting",
    re.IGNORECASE,
)


def _plural(doing: str) -> str:
    return re.sub(r"^is ", "are ", doing).replace("it writes", "they write")
