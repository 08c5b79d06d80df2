"""One altered file through one reader, within bounds: what came of it, or how it went wrong.

Requirement: a reader ends, soon and small. CPU time is bounded by a timer of this process (wall
clock would blame a busy machine), memory by what Python allocates: a few files' worth. Both bounds
are far from what any input needs, and near to what a bomb takes.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.fuzzing.audit import CodeFromFile, no_code_from_files
from tests.fuzzing.reader import Reader, Violation
from tpcheck.errors import TPCheckError

MAX_CPU_S = 20
MAX_BYTES = 128 * 2**20
MAX_TIMES = 100
"""Bytes of memory per byte of the file, besides MAX_BYTES."""

MAX_MESSAGE = 20_000
"""Characters of a refusal: it is read on a terminal."""

BAD = ("crash", "hang", "memory", "code", "law", "message")


class Hang(BaseException):
    """The timer fired. No Exception: readers may catch those."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one input. `outcome`: refused, accepted, same, or one of BAD, with `text`."""

    outcome: str
    text: str
    cpu_s: float
    peak_bytes: int


def altered(reader: Reader, edit: str, rng: random.Random) -> bytes:
    """Return the reader's file after one edit, now and then after two."""
    data = reader.original
    if edit == "nothing":
        return data
    data = reader.edits[edit](rng, data)
    if edit == "forge" or rng.random() < 0.85 or not data:
        return data
    second = rng.choice(("flip a bit", "another digit", "truncate", "insert"))
    return reader.edits[second](rng, data)


def judged(reader: Reader, data: bytes) -> Result:
    """Read altered bytes; never raises for what a reader does."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with warnings.catch_warnings(), no_code_from_files() as seen, _limited():
            warnings.simplefilter("ignore")  # a pattern of the user's own that Python finds odd
            outcome, text = _outcome(reader, data)
        cpu_s = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if seen:
        outcome, text = "code", seen[0]
    elif outcome in ("refused", "accepted", "same") and peak > MAX_BYTES + MAX_TIMES * len(data):
        outcome, text = "memory", f"{peak} bytes for a file of {len(data)}"
    return Result(outcome, text, cpu_s, peak)


def _outcome(reader: Reader, data: bytes) -> tuple[str, str]:
    try:
        return reader.judge(data), ""
    except TPCheckError as error:
        text = str(error)
        if len(text) > MAX_MESSAGE:
            return "message", f"{len(text)} characters: {text[:200]}"
        return "refused", text
    except CodeFromFile as error:
        return "code", str(error)
    except Violation as error:
        return "law", str(error)
    except Hang:
        return "hang", f"more than {MAX_CPU_S} s of CPU time"
    except MemoryError:
        return "memory", "MemoryError"
    except Exception as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-4:]
        where = " < ".join(f"{one.filename.rpartition('/')[2]}:{one.lineno}" for one in last[::-1])
        return "crash", f"{type(error).__name__}: {str(error)[:200]} [{where}]"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def fired(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, fired)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
