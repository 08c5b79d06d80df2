"""One thing a policy asks for, what the report says to it, and whether that is enough.

Requirement: one that is not met has a sentence and a way to settle it; one that is met has neither.
So a decision can be shown whole, and what it rests on is never left out. What a report put into a
name stays on one line and shows its control characters: it can neither rewrite a terminal nor add a
line to what is there to be pasted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a deployment may not start: one sentence, and the command that would settle it."""

    reason: str
    settle: str


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement; `key` is the policy's, `where` the degree, dtype and backend if it has one.

    Raises:
        ValueError: it is not met and lacks a reason or a way to settle it, or is met and has one.
    """

    key: str
    asked: str
    found: str
    met: bool
    where: str = ""
    reason: str = ""
    settle: str = ""

    def __post_init__(self) -> None:
        for name in ("asked", "found", "where", "reason", "settle"):
            object.__setattr__(self, name, one_line(getattr(self, name)))
        if self.met == bool(self.reason) or self.met == bool(self.settle):
            raise ValueError(f"{self.key}: has a reason and a way to settle it unless it is met")


def one_line(text: str) -> str:
    """Return the text with whatever is no printable character, line ends too, as an escape.

    Example:
        >>> one_line("a\\x1b[2J\\nb")
        'a\\\\x1b[2J\\\\nb'
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def listed(headline: str, refusals: Sequence[Refusal]) -> str:
    """Return every reason, each with what would settle it; a headline and their count first."""
    lines = [f"{headline}: {counted(len(refusals), 'reason')}"]
    for refusal in refusals:
        lines += [f"- {refusal.reason}", f"  settle: {refusal.settle}"]
    return "\n".join(lines)


def counted(number: int, what: str) -> str:
    """Write a number of things.

    Example:
        >>> counted(1, "case"), counted(2, "case")
        ('1 case', '2 cases')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
