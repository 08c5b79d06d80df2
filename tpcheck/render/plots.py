"""What a plot of a page is, whatever it shows.

Requirement: a plot comes with a title that says what to see, its numbers as a table and a
description for who cannot see it; one without data is a sentence that says why. What was left out
to keep it readable is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.render.drift_series import MAX_KEYS

MAX_TABLE = 160
"""Rows of the table beside a plot; the JSON has all."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of a page, or the `reason` why there is none. `svg` is markup, all else text."""

    name: str
    title: str
    says: str = ""
    svg: str = ""
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""


def cut(rows: Sequence[Any], found: Mapping[Any, Any]) -> tuple[str, ...]:
    """Say what of some lines or small plots, and of the rows of their table, was left out."""
    left = len(found) - MAX_KEYS
    said = [f"{left} more degrees and dtypes are in the JSON only"] if left > 0 else []
    if len(rows) > MAX_TABLE:
        said.append(f"the table leaves out {len(rows) - MAX_TABLE} rows; the JSON has them")
    return tuple(said)
