"""How far a tensor may be off, and who said so.

Requirement: no tolerance without a source, and none by accident. A file's last word is a catch-all
that its author had to write. Without a file, numbers or an oracle, tensors must have equal bits:
two captures say nothing of how much rounding to expect. With an oracle (TP=1 in a wider dtype) the
tolerance is derived from TP=1's own error. Integers and bools are equal or not, whatever a rule
says: a tolerance is for what was rounded.

[Allowance] An element may be off by atol + rtol * |expected| + max_ulp * ulp(expected); what is not
given counts 0. `relative_rms` limits the whole tensor besides, or alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.captures.rules import read_entries
from tpcheck.errors import TPCheckError
from tpcheck.json_reader import brief
from tpcheck.numerics.tolerance import Tolerance, users_tolerance

NUMBERS = ("atol", "rtol", "max_ulp", "relative_rms")
CATCH_ALL = ".*"


@dataclass(frozen=True, slots=True)
class Limit:
    """What one tensor is held to. None: not asked. `bits`: equal bits, and nothing else counts.

    `other_dtype`: the two sides may be stored in different dtypes and are compared by value.
    `partial_bound`: `worst_case_sum` may replace equal bits for a sum of partial terms.
    """

    source: str
    atol: float | None = None
    rtol: float | None = None
    max_ulp: float | None = None
    relative_rms: float | None = None
    bits: bool = False
    other_dtype: bool = False
    partial_bound: bool = False

    @property
    def elementwise(self) -> bool:
        """Whether single elements are limited."""
        return not (self.atol is None and self.rtol is None and self.max_ulp is None)

    @property
    def text(self) -> str:
        """The numbers, as messages print them."""
        if self.bits:
            return "equal bits"
        shown = ((name, getattr(self, name)) for name in NUMBERS)
        listed = ", ".join(f"{name}={value:g}" for name, value in shown if value is not None)
        return listed or "rounding can explain"


@dataclass(frozen=True, slots=True)
class ToleranceRule:
    """One entry of a tolerance file."""

    where: str
    pattern: re.Pattern[str]
    limit: Limit


EQUAL_BITS = Limit("no tolerance was given", bits=True, partial_bound=True)
INTEGERS = Limit("integers and bools are equal or not", bits=True)


def read_tolerances(source: str | Path | Mapping[str, Any]) -> tuple[ToleranceRule, ...]:
    """Return the rules of a tolerance file, or of a dict that looks like one.

    Raises:
        TPCheckError: it cannot be read, holds something unknown, or has no catch-all.
    """
    keys = (*NUMBERS, "bits", "other_dtype")
    entries = read_entries(source, "tolerance", keys)
    rules = tuple(
        ToleranceRule(place, pattern, _limit(place, entry)) for place, pattern, entry in entries
    )
    if not any(rule.pattern.pattern == CATCH_ALL for rule in rules):
        where = rules[0].where.rpartition(":")[0]
        raise TPCheckError(
            f"{where}: has no catch-all, but should end with one for tensors that no other rule"
            f" names: match = '{CATCH_ALL}'"
        )
    return rules


def unreachable(rules: tuple[ToleranceRule, ...]) -> list[str]:
    """Say which rules stand behind the catch-all: one sentence each."""
    last = next(i for i, rule in enumerate(rules) if rule.pattern.pattern == CATCH_ALL)
    return [
        f"{rule.where} ({brief(rule.pattern.pattern)}) can never be used: it stands behind the"
        f" catch-all"
        for rule in rules[last + 1 :]
    ]


def given_limit(atol: float | None, rtol: float | None) -> Limit | None:
    """Return what --atol and --rtol ask of every tensor, None where neither was given."""
    given = users_tolerance(atol, rtol, None)
    return None if given is None else from_tolerance(given)


def from_tolerance(tolerance: Tolerance) -> Limit:
    """Return the limit with a tolerance's numbers and source."""
    return Limit(tolerance.source, atol=tolerance.atol, rtol=tolerance.rtol)


def _limit(place: str, entry: Mapping[str, Any]) -> Limit:
    for name in NUMBERS:
        value = entry.get(name, 0)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or not 0 <= value <= sys.float_info.max:  # NaN is neither
            raise TPCheckError(f"{place}.{name}={brief(value)}, but should be a finite number >= 0")
    for name in ("bits", "other_dtype"):
        if not isinstance(entry.get(name, False), bool):
            raise TPCheckError(f"{place}.{name}={brief(entry[name])}, but should be true or false")
    given: dict[str, Any] = {name: float(entry[name]) for name in NUMBERS if name in entry}
    bits, other_dtype = entry.get("bits", False), entry.get("other_dtype", False)
    if bits and (given or other_dtype):
        raise TPCheckError(f"{place}.bits=true cannot be combined with another key")
    if not bits and not given:
        raise TPCheckError(f"{place} limits nothing, but should give {', '.join(NUMBERS)} or bits")
    return Limit(place, **given, bits=bits, other_dtype=other_dtype)
