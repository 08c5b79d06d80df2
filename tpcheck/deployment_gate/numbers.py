"""Read a number that a report claims, or say why it is none.

Requirement: a limit is met by a number and by nothing else. Null, text, true, a NaN or a negative
size is as good as missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Lack:
    """What a verdict lacks. `missing`: it does not say; what it says is not enough otherwise."""

    text: str
    missing: bool = False


def size(value: Any) -> float | int | None:
    """Return a finite number of at least 0 as it stands; None for anything else.

    Example:
        >>> size(1.5), size(0), size(-1), size(True), size("1"), size(float("nan"))
        (1.5, 0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value >= 0 else None


def whole(value: Any) -> int | None:
    """Return a whole number of at least 0; None for anything else."""
    found = size(value)
    return found if isinstance(found, int) else None


def shown(value: Any) -> str:
    """Write what stands in a report, at most 60 characters of it.

    Example:
        >>> shown(1.0395), shown(None), shown("x")
        ('1.04', 'null', "'x'")
    """
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def lack_of_size(facts: Mapping[str, Any], name: str, *, where: str, limit: float) -> Lack | None:
    """Say why the number at `name` does not meet a limit; None if it does."""
    if name not in facts:
        return Lack(f"{where}.{name} is missing, but should be at most {limit:g}", missing=True)
    value = size(facts[name])
    if value is None:
        because = facts.get(f"{name}_reason")
        why = f" ({because})" if isinstance(because, str) and because else ""
        found = f"{shown(facts[name])}{why}"
        text = f"{where}.{name}={found}, but should be a number of at most {limit:g}"
        return Lack(text, missing=True)
    if value > limit:
        return Lack(f"{where}.{name}={just_above(value, limit)}, but should be at most {limit:g}")
    return None


def just_above(value: float | int, limit: float) -> str:
    """Write a number that is above a limit so that it also looks it."""
    text = shown(value)
    return text if isinstance(value, int) or float(text) > limit else repr(value)
