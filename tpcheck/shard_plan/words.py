"""The words of a refusal: what is split, and which rule that breaks."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One broken rule, and what would come of ignoring it."""

    line: str
    consequences: tuple[str, ...] = ()


class Width(NamedTuple):
    """What is split by features, 0 wide where the spec has no such part."""

    where: str
    name: str
    size: int
    split: str
