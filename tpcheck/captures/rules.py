"""Rules by tensor name from a TOML file: the first whose pattern matches the whole name counts.

Requirement: a typo never widens a tolerance or moves a shard in silence. Unknown keys and values of
another kind are errors that name file and entry; a rule that no tensor uses is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tpcheck.captures.order import compile_pattern
from tpcheck.errors import TPCheckError
from tpcheck.files import read_toml
from tpcheck.json_reader import brief


class Rule(Protocol):
    """Something said about the tensors whose whole name a pattern matches."""

    @property
    def pattern(self) -> re.Pattern[str]: ...
    @property
    def where(self) -> str: ...


AnyRule = TypeVar("AnyRule", bound=Rule)

Entry = Mapping[str, Any]


def read_entries(
    source: str | Path | Mapping[str, Any], table: str, keys: Sequence[str]
) -> list[tuple[str, re.Pattern[str], Entry]]:
    """Return (place, pattern, entry) of every `[[table]]` of a TOML file or of a dict like it.

    Raises:
        TPCheckError: it cannot be read, holds anything else, or an entry has an unknown key.
    """
    name = "tolerances" if table == "tolerance" else "shard map"
    where = name if isinstance(source, Mapping) else str(source)
    value = source if isinstance(source, Mapping) else read_toml(source)
    odd = [key for key in value if key != table]
    if odd:
        raise TPCheckError(f"{where}: {brief(odd[0])} is unknown; it holds [[{table}]] tables only")
    entries = value.get(table)
    if not isinstance(entries, list) or not entries:
        raise TPCheckError(f"{where}: holds no [[{table}]], but should hold at least one")
    found = []
    for i, entry in enumerate(entries):
        place = f"{where}: {table}[{i}]"
        if not isinstance(entry, Mapping):
            raise TPCheckError(f"{place}={brief(entry)}, but should be a table")
        for key in entry:
            if key != "match" and key not in keys:
                raise TPCheckError(
                    f"{place}.{key:.60} is unknown, but should be one of match, {', '.join(keys)}"
                )
        if "match" not in entry:
            raise TPCheckError(f"{place}.match is missing, but should be a regular expression")
        found.append((place, compile_pattern(entry["match"], f"{place}.match"), entry))
    return found


def first_match(rules: Sequence[AnyRule], name: str) -> AnyRule | None:
    """Return the rule for a tensor, None where none matches its whole name."""
    return next((rule for rule in rules if rule.pattern.fullmatch(name)), None)


def unused(rules: Sequence[Rule], used: Sequence[Rule | None]) -> list[str]:
    """Say which rules no tensor uses: one sentence each."""
    taken = {id(rule) for rule in used}
    return [
        f"{rule.where} ({brief(rule.pattern.pattern)}) is used by no tensor"
        for rule in rules
        if id(rule) not in taken
    ]
