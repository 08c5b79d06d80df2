"""What a rank is doing right now, readable by the parent even when the rank is stuck or dead.

Requirement: a hang is named by rank, operation, sequence number, shape, dtype and stack. A rank
that hangs cannot be asked, so it leaves its operation in a small shared file before every
collective, and a signal handler in C (faulthandler) writes its Python stack to another.
"""

from __future__ import annotations

import faulthandler
import mmap
import re
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

from tpcheck.trace import Collective

IDLE, COMPUTING, WAITING, RETURNED = range(4)

_BYTES = 4096
_HEAD = struct.Struct("<QQBIqH")  # version, job, state, generation, sequence, length of the text


@dataclass(frozen=True, slots=True)
class Flight:
    """One look at a rank. `sequence` and `text` are those of its last collective, -1 before it.

    `generation` counts the groups built in this job: each numbers its collectives from 0.
    """

    job: int = 0
    state: int = IDLE
    generation: int = 0
    sequence: int = -1
    text: str = ""

    @property
    def waits(self) -> bool:
        return self.state == WAITING

    def describe(self) -> str:
        """Return `#5 all_reduce([4, 64] bfloat16, sum)`, or "" outside any collective."""
        return f"#{self.sequence} {self.text}" if self.waits else ""


class FlightSlot:
    """One rank's slot: the rank writes, the parent reads. Writing costs a few microseconds."""

    def __init__(self, path: Path) -> None:
        with open(path, "a+b") as file:
            file.truncate(_BYTES)
            self._map = mmap.mmap(file.fileno(), _BYTES)
        self._last = Flight()

    def begin(self, job: int) -> None:
        self._write(Flight(job, COMPUTING))

    def new_group(self) -> None:
        last = self._last
        self._write(Flight(last.job, COMPUTING, last.generation + 1))

    def enter(self, call: Collective) -> None:
        last = self._last
        self._write(Flight(last.job, WAITING, last.generation, call.sequence, call.describe()))

    def exit(self) -> None:
        self._state(COMPUTING)

    def end(self) -> None:
        self._state(RETURNED)

    def read(self) -> Flight:
        """Return the rank's flight; the one read before if the rank is just writing."""
        for _ in range(8):
            before = bytes(self._map)
            version, job, state, generation, sequence, length = _HEAD.unpack_from(before)
            if version % 2 == 0 and _HEAD.unpack_from(self._map)[0] == version:
                text = before[_HEAD.size : _HEAD.size + length].decode(errors="replace")
                self._last = Flight(job, state, generation, sequence, text)
                break
        return self._last

    def clear(self) -> None:
        """Forget what a dead rank left, also if it died while writing. For the parent."""
        self._map[:] = bytes(_BYTES)
        self._last = Flight()

    def close(self) -> None:
        self._map.close()

    def _state(self, state: int) -> None:
        last = self._last
        self._write(Flight(last.job, state, last.generation, last.sequence, last.text))

    def _write(self, flight: Flight) -> None:
        self._last = flight
        text = flight.text.encode()[: _BYTES - _HEAD.size]
        (version,) = struct.unpack_from("<Q", self._map)
        fields = (flight.job, flight.state, flight.generation, flight.sequence, len(text))
        # An odd version says "being written", so a reader never shows half of two calls.
        struct.pack_into("<Q", self._map, 0, version | 1)
        self._map[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._map, 0, version | 1, *fields)
        struct.pack_into("<Q", self._map, 0, (version | 1) + 1)


STACK_SIGNAL = signal.SIGUSR1


def write_stacks_to(path: Path) -> None:
    """Make this process write its stacks to `path` on STACK_SIGNAL and on a fatal signal."""
    file = open(path, "wb", buffering=0)
    faulthandler.enable(file=file)
    faulthandler.register(STACK_SIGNAL, file=file, all_threads=True, chain=False)
    _kept_open.append(file)


_kept_open: list[object] = []  # faulthandler keeps the descriptor only


def subject_part(stack: str) -> str:
    """Return a faulthandler dump without the frames below the job function."""
    return re.sub(r'\n  File "[^"]*tpcheck/groups/worker\.py", [^\n]*(\n  File [^\n]*)*', "", stack)


def innermost_frame(stack: str) -> str:
    """Return the innermost call of a faulthandler dump as `forward (model.py:12)`, or "".

    It is that of the current thread; a dump that has not come to it says nothing yet.
    """
    _, found, current = stack.partition("Current thread")
    match = re.search(r'File "([^"]*)", line (\d+) in (\S+)', current) if found else None
    if match is None:
        return ""
    file, line, function = match.groups()
    return f"{function} ({Path(file).name}:{line})"


def rank_list(ranks: list[int]) -> str:
    """Return `rank 3` or `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    texts = [f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
