"""Arguments as text: what is the same in every program once, what differs as a formula or a choice.

Requirement: a person reads the script. Numbers that depend on rank and size are written in `n` and
`r` where a short formula gives them, so that a slice looks like a slice; anything else that differs
is a conditional expression, which reads as the bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tpcheck.observation.program import Constant, Ref, Sequence_, Slice

Text = tuple[str, int]
"""An expression, and how tightly it binds: ATOM is a name or a call, CHOICE needs parentheses
wherever it is not an argument."""

ATOM, UNARY, CHOICE = 9, 7, 0

Place = tuple[int, int]
"""Of a program: (n, r), the number of ranks and the rank."""


class Unwritable(Exception):
    """Something of the program has no text. The message says what."""


_SUM, _PRODUCT = 5, 6
_FORMULAS: tuple[tuple[str, Callable[[int, int, int], int], int], ...] = (
    ("n", lambda c, n, r: n, ATOM),
    ("r", lambda c, n, r: r, ATOM),
    ("n - 1", lambda c, n, r: n - 1, _SUM),
    ("r + 1", lambda c, n, r: r + 1, _SUM),
    ("(r + 1) % n", lambda c, n, r: (r + 1) % n, _PRODUCT),
    ("n - 1 - r", lambda c, n, r: n - 1 - r, _SUM),
    ("{c} // n", lambda c, n, r: c // n, _PRODUCT),
    ("{c} * n", lambda c, n, r: c * n, _PRODUCT),
    ("{c} * r", lambda c, n, r: c * r, _PRODUCT),
    ("{c} * (r + 1)", lambda c, n, r: c * (r + 1), _PRODUCT),
    ("{c} // n * r", lambda c, n, r: c // n * r, _PRODUCT),
    ("{c} // n * (r + 1)", lambda c, n, r: c // n * (r + 1), _PRODUCT),
    ("-{c} * r", lambda c, n, r: -c * r, _PRODUCT),
)
"""Text, value, and how tightly it binds; in order of preference."""


class Values:
    """Writes merged arguments. `name(ref)` gives the text of a slot's result."""

    def __init__(self, places: Sequence[Place], name: Callable[[int], Text]) -> None:
        self._places = places
        self._name = name

    def text(self, values: Mapping[int, Any]) -> Text:
        """Return the text of one argument, given program number -> its value there."""
        seen = list(values.values())
        first = seen[0]
        if all(isinstance(v, Ref) for v in seen):
            return self._of_refs(values)
        if all(type(v) is int for v in seen):
            return self._of_ints(values)
        for kind, parts in _CONTAINERS:
            if all(isinstance(v, kind) for v in seen) and len({len(parts(v)) for v in seen}) == 1:
                split = {p: parts(v) for p, v in values.items()}
                items = [{p: v[i] for p, v in split.items()} for i in range(len(parts(first)))]
                return self._container(kind, items)
        if len(seen) == 1 or all(_equal(v, first) for v in seen):
            return literal(first)
        return self._choice({p: self.text({p: v}) for p, v in values.items()})

    def condition(self, chosen: set[int], among: set[int]) -> str:
        """Return a condition on n and r that holds for exactly the `chosen` programs of `among`."""
        for text, holds in _conditions({r for _, r in self._places}):
            if {p for p in among if holds(*self._places[p])} == chosen:
                return text
        return f"(n, r) in {sorted(self._places[p] for p in chosen)}"

    def _of_refs(self, values: Mapping[int, Ref]) -> Text:
        if len({ref.step for ref in values.values()}) > 1:
            return self._choice({p: self._of_refs({p: ref}) for p, ref in values.items()})
        base = self._name(next(iter(values.values())).step)
        indices = {p: ref.index for p, ref in values.items()}
        if set(indices.values()) == {-1}:
            return base
        if -1 in indices.values():
            return self._choice({p: self._of_refs({p: ref}) for p, ref in values.items()})
        return f"{operand(base)}[{self._of_ints(indices)[0]}]", ATOM

    def _of_ints(self, values: Mapping[int, int]) -> Text:
        numbers = set(values.values())
        if len(numbers) == 1:
            return literal(numbers.pop())
        constants = sorted({abs(v) * k for v in numbers for k in (1, *values)} - {0})
        constants += sorted({abs(v) * self._places[p][0] for p, v in values.items()} - {0})
        for form, value, level in _FORMULAS:
            for c in constants:
                if all(value(c, *self._places[p]) == v for p, v in values.items()):
                    return form.format(c=c), level
        return self._choice({p: literal(v) for p, v in values.items()})

    def _choice(self, texts: Mapping[int, Text]) -> Text:
        groups: dict[str, set[int]] = {}
        for p, text in texts.items():
            groups.setdefault(text[0], set()).add(p)
        if len(groups) == 1:
            return next(iter(texts.values()))
        left, pieces = set(texts), []
        for chosen in list(groups.values())[:-1]:
            part = operand(texts[min(chosen)], CHOICE + 1)
            pieces.append(f"{part} if {self.condition(chosen, left)} else ")
            left -= chosen
        return "".join(pieces) + list(groups)[-1], CHOICE

    def _container(self, kind: Any, items: Sequence[Mapping[int, Any]]) -> Text:
        texts = [self.text(item)[0] for item in items]
        if kind is Sequence_:
            return f"[{', '.join(texts)}]", ATOM
        if kind is Slice:
            start, stop, step = ("" if text == "None" else text for text in texts)
            return f"{start}:{stop}" + (f":{step}" if step else ""), ATOM
        return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})", ATOM


def _conditions(ranks: set[int]) -> Iterator[tuple[str, Callable[[int, int], bool]]]:
    """Yield conditions on n and r, the plainest first."""
    yield "n == 1", lambda n, _: n == 1
    yield "n > 1", lambda n, _: n > 1
    texts = [f"r {symbol} {k}" for symbol in ("==", "!=", "<", ">") for k in sorted(ranks)]
    texts += [f"{also} r == {k}" for k in sorted(ranks) for also in ("n > 1 and", "n == 1 or")]
    for text in texts:
        yield text, eval(f"lambda n, r: {text}")


_CONTAINERS: tuple[tuple[Any, Callable[[Any], tuple[Any, ...]]], ...] = (
    (tuple, lambda v: tuple(v)),
    (Sequence_, lambda v: v.items),
    (Slice, lambda v: (v.start, v.stop, v.step)),
)


def operand(text: Text, level: int = ATOM) -> str:
    """Return an expression as an operand: in parentheses unless it binds at least as tightly."""
    return text[0] if text[1] >= level else f"({text[0]})"


def literal(value: Any) -> Text:
    """Return a plain value as text.

    Raises:
        Unwritable: it has none.
    """
    if isinstance(value, Constant):
        return _tensor(value), ATOM
    if value is Ellipsis:
        return "...", ATOM
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")', ATOM
    if value is None or isinstance(value, (bool, str, torch.dtype, torch.memory_format)):
        return str(value) if not isinstance(value, str) else f'"{value}"', ATOM
    if isinstance(value, torch.device):
        return f'"{value}"', ATOM
    if isinstance(value, (int, float)):
        return repr(value), ATOM if value >= 0 else UNARY
    raise Unwritable(f"a {type(value).__name__} has no text")


def _tensor(value: Constant) -> str:
    dtype = "" if value.dtype in ("torch.bool", "torch.int64") else f", dtype={value.dtype}"
    if len(value.values) != 1 and len(set(value.values)) <= 1:
        filled = value.values[0] if value.values else 0
        return f"torch.full({value.shape}, {_number(filled)}{dtype})"
    return f"torch.tensor({_nested(value.shape, value.values)}{dtype})"


def _nested(shape: Sequence[int], values: Sequence[Any]) -> str:
    if not shape:
        return _number(values[0])
    each = len(values) // shape[0]
    rows = (_nested(shape[1:], values[i * each : (i + 1) * each]) for i in range(shape[0]))
    return f"[{', '.join(rows)}]"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return repr(value)
    short = f"{value:.8g}"
    if not math.isfinite(value):
        return f'float("{value}")'
    return short if any(c in short for c in ".e") else short + "."


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
