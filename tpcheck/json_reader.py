"""Read JSON that came from elsewhere: strictly, and as a value that knows its path. Torch-free.

Requirement: JSON means the same to every reader: UTF-8, no NaN or Infinity, no key that stands
twice, no number and no nesting that only some programs can hold. And
whatever is missing, has another type or another value than allowed is refused with the path of the
very value, `report.verdicts[3].tp_size=True, but should be a whole number`, so that a hand-edited
or foreign file can be mended without reading our source.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from tpcheck.errors import TPCheckError

_WORDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_MISSING: Any = object()

MAX_DEPTH = 256
"""Lists and objects inside each other: what walks a value, or prints it, does so by recursion."""

_SAFE_DIGITS = 300
"""So many digits are below the largest float."""


class JsonReader:
    """A JSON value that knows its path, so that what it refuses can be found."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str, kind: Any = dict) -> None:
        # bool is an int to Python, but not to a reader of JSON
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            refuse(path, value, _named(kind))
        self.value = value
        self.path = path

    def reader(self, key: str, kind: Any = dict, default: Any = _MISSING) -> JsonReader:
        """Return the value at `key` with its path; a missing key without a default is refused."""
        value = self.value.get(key, default)
        if value is _MISSING:
            raise TPCheckError(f"{self.path}.{key} is missing, but should be {_named(kind)}")
        return JsonReader(value, f"{self.path}.{brief_name(key)}", kind)

    def get(self, key: str, kind: Any, default: Any = _MISSING) -> Any:
        """Return the value at `key` if it is of this kind."""
        return self.reader(key, kind, default).value

    def optional(self, key: str, kind: Any) -> Any:
        """Return the value at `key`, None where it is null or absent."""
        return None if self.value.get(key) is None else self.get(key, kind)

    def items(self, key: str, kind: Any, default: Any = _MISSING) -> list[JsonReader]:
        """Return the items of the list at `key`, each with its path."""
        values = self.get(key, list, list(default) if default is not _MISSING else _MISSING)
        return [
            JsonReader(value, f"{self.path}.{key}[{i}]", kind) for i, value in enumerate(values)
        ]

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """Return the text at `key` if it is one of these words."""
        value: str = self.get(key, str)
        if value not in allowed:
            refuse(f"{self.path}.{key}", value, f"one of {', '.join(allowed)}")
        return value


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value, as strict as the standard.

    Raises:
        ValueError: it is not JSON in UTF-8, holds NaN, Infinity or a number too large for a float,
            nests deeper than MAX_DEPTH, or a key stands twice in one object.
    """
    value = json.loads(
        # of bytes, json would guess the encoding, and read what other programs refuse
        text if isinstance(text, str) else text.decode("utf-8"),
        parse_constant=_no_constant,
        parse_float=_finite_float,
        parse_int=_finite_int,
        object_pairs_hook=_unique_keys,
    )
    require_shallow(value)
    return value


def require_shallow(value: Any) -> None:
    """Raise ValueError where lists and objects are inside each other deeper than MAX_DEPTH."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it nests deeper than {MAX_DEPTH} lists and objects")


def refuse(path: str, value: Any, expected: str) -> NoReturn:
    """Raise a TPCheckError that says what stands at `path` and what should."""
    raise TPCheckError(f"{path}={brief(value, 60)}, but should be {expected}")


def brief(value: Any, most: int = 200) -> str:
    """Write a value of a file that nobody vouches for into a message: at most so many characters.

    Example:
        >>> brief([1, 2]), brief("x" * 100, 12)
        ('[1, 2]', "'xxxxxxxx...")
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or deeper, than Python writes
        text = f"a {type(value).__name__} that is too large to be written"
    return text if len(text) <= most else text[: most - 3] + "..."


def brief_name(name: str) -> str:
    """Write a name of a file that nobody vouches for into a message: as it is if it is harmless.

    Example:
        >>> brief_name("drift"), brief_name("a\\nb")
        ('drift', "'a\\\\nb'")
    """
    return name if name.isprintable() and len(name) <= 60 else brief(name, 60)


def _named(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(_WORDS[one] for one in kinds)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        shown = digits if len(digits) <= 60 else digits[:57] + "..."
        raise ValueError(f"{shown} is beyond what a float can hold")
    return value


def _finite_int(digits: str) -> int:
    if len(digits) > _SAFE_DIGITS:
        _finite_float(digits)
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = Counter(name for name, _ in pairs)
        twice = next(name for name, count in seen.items() if count > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one object")
    return value
