"""In which order tensors are compared: the first that differs is where to look.

Requirement: `layers.2` stands before `layers.10`, and the user's own order, a list of names or
patterns, stands above that. A line that no name matches is reported: it is a typo.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tpcheck.errors import TPCheckError
from tpcheck.files import read_bounded
from tpcheck.json_reader import brief

MAX_BYTES = 1 << 24
"""Of an order file: a name each of some 100,000 tensors."""


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts numbers inside names by their value.

    Example:
        >>> sorted(["layers.10", "layers.2", "embed"], key=natural_key)
        ['embed', 'layers.2', 'layers.10']
    """
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    # text and numbers alternate, so that like is compared with like; huge numbers by their length
    return tuple(
        (len(part.lstrip("0")), 0, part.lstrip("0")) if i % 2 else (0, 1, part)
        for i, part in enumerate(parts)
    )


def read_order(path: str | Path) -> tuple[str, ...]:
    """Return the lines of an order file: one name or pattern each, `#` begins a comment.

    Raises:
        TPCheckError: the file cannot be read, is empty, or a line is no pattern.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
    except ValueError as error:
        raise TPCheckError(f"{path}: is not UTF-8 text: {error}") from error
    stripped = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in stripped if line and not line.startswith("#")]
    if not lines:
        raise TPCheckError(f"{path}: is empty, but should hold a name or pattern per line")
    for i, line in lines:
        compile_pattern(line, f"{path}: line {i}")
    return tuple(line for _, line in lines)


def compile_pattern(text: object, where: str) -> re.Pattern[str]:
    """Return a regular expression that has to match a whole name.

    Raises:
        TPCheckError: it is none; names the place.
    """
    if not isinstance(text, str):
        raise TPCheckError(f"{where}={brief(text)}, but should be a regular expression")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise TPCheckError(
            f"{where}={brief(text)}, but should be a regular expression: {error}"
        ) from error


def in_order(
    names: Iterable[str], lines: Sequence[str], *, patterns: bool = True
) -> tuple[list[str], list[str]]:
    """Return the names in the order of the first line that matches each, and the unused lines.

    A line that is a name, letter by letter, goes before patterns; names that no line matches come
    last, in natural order.
    """
    exact = {line: i for i, line in reversed(list(enumerate(lines)))}
    compiled = [re.compile(line) for line in lines] if patterns else []
    used: set[int] = set()
    found = []
    for name in names:
        at = exact.get(name)
        if at is None:
            matches = (i for i, one in enumerate(compiled) if one.fullmatch(name))
            at = next(matches, len(lines))
        used.add(at)
        found.append((at, natural_key(name), name))
    unused = [line for i, line in enumerate(lines) if i not in used]
    return [name for _, _, name in sorted(found)], unused
