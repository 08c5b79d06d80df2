"""Stacks of ranks as a reader needs them: the user's frames, where it stopped, and nothing twice.

Requirement: a stack leads to a line that the reader can change. Between those lie frames of torch
and of tpcheck, many of them; most ranks stand at the same place; and what an exception says in many
lines ends its traceback too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

MAX_LINES = 24

_INNER = re.compile(
    r"[/\\](tpcheck[/\\](groups|execution|building|observation)"
    r"|torch[/\\](nn[/\\]modules[/\\]module|_ops|utils[/\\]_contextlib))\b"
)
_LIBRARY = re.compile(r"[/\\](site-packages|dist-packages|lib[/\\]python3[.\d]*)[/\\]")
_OF_A_RANK = re.compile(r"rank (\d+) stack:\n")


def shown_stack(lines: Sequence[str]) -> list[str]:
    """Return the frames of interest.

    Left out are the frames between the user's: how tpcheck and torch call a module. Of a stack that
    is still long, frames of libraries go too, but for its ends: where it was called and where it
    stands. What is longer even so loses its middle.
    """
    kept = [line for frame in _frames(lines) if not _is(frame, _INNER) for line in frame]
    kept = kept if len(kept) > 1 else list(lines)
    if len(kept) > MAX_LINES:
        kept = _without_libraries(kept)
    cut = len(kept) - MAX_LINES
    if cut > 0:
        half = MAX_LINES // 2
        kept = [*kept[:half], f"... {cut} more lines", *kept[-half:]]
    return kept


def told_once(reasons: Sequence[str]) -> list[str]:
    """Return reasons with equal stacks joined, and no text of an exception before its traceback."""
    told: list[str] = []
    for stack, same in itertools.groupby(reasons, key=_stack):
        each = list(same)
        if stack is None or len(each) == 1:
            told += each
        else:
            ranks = [int(_OF_A_RANK.match(reason)[1]) for reason in each]  # type: ignore[index]
            told.append(f"ranks {_spans(ranks)} stack:\n{stack}")
    if len(told) > 1:
        first, _, rest = told[0].partition("\n")
        if rest and rest.rstrip() in told[1]:
            told[0] = first
    return told


def _stack(reason: str) -> str | None:
    found = _OF_A_RANK.match(reason)
    return reason[found.end() :] if found else None


def _spans(ranks: Sequence[int]) -> str:
    """Write ranks in order as `0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _frames(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield each frame's lines, and every other line by itself."""
    frame: list[str] = []
    for line in lines:
        if frame and line.startswith("  ") and not _opens(line):
            frame.append(line)
            continue
        if frame:
            yield frame
        frame = [line] if _opens(line) else []
        if not frame:
            yield [line]
    if frame:
        yield frame


def _opens(line: str) -> bool:
    return line.lstrip().startswith('File "')


def _is(frame: Sequence[str], place: re.Pattern[str]) -> bool:
    return _opens(frame[0]) and bool(place.search(frame[0]))


def _without_libraries(lines: Sequence[str]) -> list[str]:
    frames = [[""], *_frames(lines), [""]]  # what is around the stack is no frame
    return [
        line
        for before, frame, after in zip(frames, frames[1:], frames[2:], strict=False)
        for line in frame
        if not _is(frame, _LIBRARY) or not (_opens(before[0]) and _opens(after[0]))
    ]
