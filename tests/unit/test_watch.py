"""What the parent says of a job that went wrong: no rank is blamed for what it has left."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tpcheck.groups.flight import COMPUTING, WAITING, Flight, innermost_frame
from tpcheck.groups.jobs import Job
from tpcheck.groups.watch import Watch
from tpcheck.groups.wire import Reply

DUMP = (
    "Thread 0x01 (most recent call first):\n"
    '  File "/lib/threading.py", line 327 in wait\n\n'
    "Current thread 0x02 (most recent call first):\n"
    '  File "/home/model.py", line 12 in forward\n'
    '  File "/home/model.py", line 3 in <module>\n'
)


@dataclass
class Link:
    """A rank whose slot the test writes."""

    now: Flight

    def flight(self) -> Flight:
        return self.now


def test_a_rank_that_raised_is_in_no_collective_that_was_seen_before() -> None:
    links = [Link(Flight(1, WAITING, 1, 0, "all_reduce([2])")) for _ in range(2)]
    watch = Watch(number=1, index=0, job=Job("m:f", None, 2, 60.0), links=links, now=0.0)
    watch.look(0.0)
    links[0].now = Flight(1, WAITING, 1, 1, "all_reduce([4])")
    links[1].now = Flight(1, COMPUTING, 1, 0, "all_reduce([2])")
    watch.take(1, Reply(1, "raised", exception_type="ValueError", message="bad"), 0.1)
    watch.look(0.1)
    failure = watch.result("failed").failure
    assert failure is not None
    assert failure.rank == 1
    assert failure.in_flight == {0: "#1 all_reduce([4])"}


@pytest.mark.parametrize("length", range(0, len(DUMP), 7))
def test_half_a_dump_names_the_right_frame_or_none(length: int) -> None:
    assert innermost_frame(DUMP) == "forward (model.py:12)"
    assert innermost_frame(DUMP[:length]) in ("", "forward (model.py:12)", *cut_in_the_name())


def cut_in_the_name() -> list[str]:
    """A dump may end inside the name of the function; the pool waits until two looks agree."""
    return [f"{'forward'[:n]} (model.py:12)" for n in range(1, 7)]
