"""The merged program as Python: one generator `model(n, r)` that yields where ranks meet.

Requirement: at most some twenty lines that a person can read. What is used once is written where it
is used; a call that only some programs make stands under their condition. Calls that change
something in place and collectives keep their order.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from tpcheck.observation.program import (
    COLLECTIVES,
    CONSTANT,
    INPUT,
    UNKNOWN,
    WEIGHT,
    Step,
)
from tpcheck.repro.alignment import Slot, refs, uses
from tpcheck.repro.values import ATOM, CHOICE, UNARY, Place, Text, Unwritable, Values, operand

WIDTH = 110
_INDENT = "    "
_OPERATORS = {
    "pow": ("**", 8),
    "mul": ("*", 6),
    "div": ("/", 6),
    "true_divide": ("/", 6),
    "truediv": ("/", 6),
    "matmul": ("@", 6),
    "floor_divide": ("//", 6),
    "floordiv": ("//", 6),
    "remainder": ("%", 6),
    "mod": ("%", 6),
    "add": ("+", 5),
    "sub": ("-", 5),
    "and": ("&", 4),
    "xor": ("^", 3),
    "or": ("|", 2),
    "gt": (">", 1),
    "lt": ("<", 1),
    "ge": (">=", 1),
    "le": ("<=", 1),
    "eq": ("==", 1),
    "ne": ("!=", 1),
}
"""Method name -> symbol and how tightly it binds."""
_UNARY = {"neg": "-", "invert": "~"}
_WIRE = {"all_reduce": "", "all_gather": "cat", "reduce_scatter": "scatter"} | {
    "all_to_all": "swap",
    "broadcast": "from",
}
_RESERVED = set("n r w F torch model run math sys hashlib zlib".split())


@dataclass(frozen=True, slots=True)
class Statement:
    """A line of the model, and the condition it stands under ("" for none)."""

    text: str
    guard: str = ""


@dataclass(frozen=True, slots=True)
class _Pending:
    """An expression that waits for its only use."""

    text: Text
    guard: str
    calls: bool


class Writer:
    """Writes one merged program.

    short: a weight's name -> the one to use. longest: characters up to which an expression takes
    in others.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        roots: Mapping[int, Any],
        places: Sequence[Place],
        short: Mapping[str, str],
        inputs: Mapping[Any, str],
        *,
        longest: int,
    ) -> None:
        self._longest = longest
        self._slots, self._roots, self._places = slots, roots, places
        self._short, self._inputs = short, inputs
        self._uses, self._users = uses(slots, roots)
        self._values = Values(places, self._reference)
        self._names: dict[int, str] = {}
        self._bases: dict[int, str] = {}
        self._taken = {*_RESERVED, *inputs.values()}
        self._pending: dict[int, _Pending] = {}
        self._taking: set[int] = set()
        self._lines: list[Statement] = []

    def statements(self) -> list[Statement]:
        """Return the model's lines, the last of them handing over the result.

        Raises:
            Unwritable: a call or a value of the program has no text.
        """
        for number, slot in enumerate(self._slots):
            self._write(number, slot)
        text = self._fitting(lambda: ("yield " + '"end", ' + self._result(), CHOICE), "", set())
        self._lines.append(Statement(text[0]))
        return self._lines

    def _result(self) -> str:
        if all(root is None for root in self._roots.values()):
            return "torch.zeros(1)"
        return self._values.text(self._roots)[0]

    def _write(self, number: int, slot: Slot) -> None:
        step = slot.any
        if step.function == INPUT:
            self._names[number] = self._inputs[step.arguments]
            return
        guard = self._guard(set(slot.steps))
        calls, writes = step.function in COLLECTIVES, bool(step.writes)
        if not (calls or writes or step.raises or self._uses.get(number)):
            return
        needed = {ref.step for s in slot.steps.values() for ref in refs((s.arguments, s.keywords))}
        if writes:
            self._flush(set(self._pending))
        elif calls:
            self._flush({p for p, held in self._pending.items() if held.calls} - needed)
        text = self._fitting(lambda: self._call(slot), guard, needed)
        if step.raises or (writes and not self._uses.get(number)):
            self._lines.append(Statement(text[0], guard))
            return
        if not self._uses.get(number):
            self._lines.append(Statement(_bare(text[0]), guard))
            return
        self._bases[number] = self._base(step)
        calls = "yield" in text[0]
        everyone = self._users[number] == set(slot.steps)
        if (
            self._uses[number] == 1
            and not writes
            and len(text[0]) <= self._longest
            and (everyone or not calls)
        ):
            self._pending[number] = _Pending(text, guard, calls)
        else:
            self._lines.append(Statement(f"{self._named(number)} = {_bare(text[0])}", guard))

    def _fitting(self, make: Any, guard: str, needed: set[int]) -> Text:
        """Return the text with as many pending expressions inside as fit on a line."""
        while True:
            self._taking = set()
            text: Text = make()
            if len(text[0]) <= self._longest or not self._taking:
                break
            longest = max(self._taking, key=lambda p: len(self._pending[p].text[0]))
            self._flush({longest})
        for taken in self._taking:
            del self._pending[taken]
        return text

    def _flush(self, numbers: set[int]) -> None:
        for number in sorted(numbers & set(self._pending)):
            held = self._pending.pop(number)
            self._lines.append(
                Statement(f"{self._named(number)} = {_bare(held.text[0])}", held.guard)
            )

    def _reference(self, number: int) -> Text:
        held = self._pending.get(number)
        if held is None:
            return self._names[number], ATOM
        self._taking.add(number)
        return held.text

    def _guard(self, programs: set[int]) -> str:
        everyone = set(range(len(self._places)))
        return "" if programs == everyone else self._values.condition(programs, everyone)

    def _base(self, step: Step) -> str:
        """Return what a result is called, before it is numbered: after its module or weight."""
        if step.function == CONSTANT:
            return "c"
        if step.function == WEIGHT:
            return _plain_name(str(step.arguments[0]).removesuffix(".weight"))
        first = next(refs(step.arguments), None)
        if not step.fqn and first is not None:
            return self._bases.get(first.step, "x")
        return _plain_name(step.fqn)

    def _named(self, number: int) -> str:
        base = self._bases[number]
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}{count}"
        self._taken.add(name)
        self._names[number] = name
        return name

    # One call.
    def _call(self, slot: Slot) -> Text:
        step = slot.any
        if len({bool(s.writes) for s in slot.steps.values()}) > 1:
            raise Unwritable(f"{step.function} writes in place on some ranks only")
        if step.function == WEIGHT:
            return self._weight(slot)
        if step.function == CONSTANT:
            return self._values.text({p: s.arguments[0] for p, s in slot.steps.items()})
        if step.function.startswith(UNKNOWN):
            raise Unwritable(f"{step.function[1:]} cannot be written")
        if step.function in COLLECTIVES:
            return self._collective(slot)
        return self._torch_call(slot)

    def _argument(self, slot: Slot, position: int) -> Text:
        return self._values.text({p: s.arguments[position] for p, s in slot.steps.items()})

    def _weight(self, slot: Slot) -> Text:
        name = str(slot.any.arguments[0])
        shape = [str(size) for size in slot.any.arguments[1:]]
        keywords = [f"{key}={value!r}" for key, value in slot.any.keywords]
        return (
            f"w({', '.join([_quoted(self._short.get(name, name)), *shape, *keywords])})",
            ATOM,
        )

    def _collective(self, slot: Slot) -> Text:
        step = slot.any
        how = [self._argument(slot, i)[0] for i in range(1, len(step.arguments))]
        word = _WIRE[step.function] or str(step.arguments[1])
        rest = how if _WIRE[step.function] else []
        return (
            f"(yield {', '.join([chr(34) + word + chr(34), self._argument(slot, 0)[0], *rest])})",
            ATOM,
        )

    def _torch_call(self, slot: Slot) -> Text:
        step, function = slot.any, slot.any.function
        arguments = [self._argument(slot, i) for i in range(len(step.arguments))]
        keywords = self._keywords(slot)
        name = re.sub(r"^__(\w+)__$", r"\1", function[1:])
        if function.startswith("="):
            return f"{operand(arguments[0])}.{function[1:]}", ATOM
        if not function.startswith("."):
            texts = [text for text, _ in arguments]
            while texts[-1:] == ["None"] and function.startswith("F."):
                texts.pop()
            texts += keywords
            return f"{function}({', '.join(texts)})", ATOM
        if name in ("getitem", "setitem"):
            index = (
                re.sub(r"^\((.*?),?\)$", r"\1", arguments[1][0])
                if isinstance(step.arguments[1], tuple)
                else arguments[1][0]
            )
            item = f"{operand(arguments[0])}[{index}]"
            return (item, ATOM) if name == "getitem" else (f"{item} = {arguments[2][0]}", CHOICE)
        if not keywords and len(arguments) == 1 and name in _UNARY:
            return f"{_UNARY[name]}{operand(arguments[0])}", UNARY
        reflected = name[1:] if function.startswith(".__r") else ""
        symbol, level = _OPERATORS.get(reflected or name, ("", 0))
        if symbol and not keywords and len(arguments) == 2:
            left, right = arguments[::-1] if reflected else arguments
            tight = level + (symbol == "**" or level == 1)
            return f"{operand(left, tight)} {symbol} {operand(right, level + 1)}", level
        rest = [text for text, _ in arguments[1:]]
        method = (
            "reshape"
            if name == "view" and not any(isinstance(a, torch.dtype) for a in step.arguments)
            else function[1:]
        )
        return f"{operand(arguments[0])}.{method}({', '.join(rest + keywords)})", ATOM

    def _keywords(self, slot: Slot) -> list[str]:
        step = slot.any
        texts = []
        for position, (key, value) in enumerate(step.keywords):
            values = {p: s.keywords[position][1] for p, s in slot.steps.items()}
            usual = _defaults(step.function).get(key, inspect.Parameter.empty)
            same = usual is value or (isinstance(value, (int, float, str)) and usual == value)
            if key.startswith("_") or key in ("device", "memory_format", "pin_memory"):
                continue
            if (same or value is None) and len(set(map(repr, values.values()))) == 1:
                continue
            texts.append(f"{key}={self._values.text(values)[0]}")
        return texts


def _quoted(text: str) -> str:
    return f'"{text}"'


def _plain_name(fqn: str) -> str:
    leaf = re.sub(r"^(self|lm)_|_(proj|tokens)$", "", fqn.rpartition(".")[2])
    if not leaf.isidentifier() or keyword.iskeyword(leaf) or len(leaf) > 12:
        return "norm" if "norm" in leaf else "x"
    return leaf


def _bare(text: str) -> str:
    """Return an expression without the parentheses round the whole of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]


@lru_cache(maxsize=256)
def _defaults(function: str) -> Mapping[str, Any]:
    """Return a function's keyword defaults, which need not be written."""
    owner: Any = functional if function.startswith("F.") else torch
    try:
        parameters = inspect.signature(getattr(owner, function.rpartition(".")[2])).parameters
    except (AttributeError, TypeError, ValueError):
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}


def laid_out(statements: Sequence[Statement], *, packed: bool, indent: int = 1) -> list[str]:
    """Return the statements as lines; `packed` puts several short ones on one line."""
    lines: list[str] = []
    position = 0
    while position < len(statements):
        guard = statements[position].guard
        end = position
        while end < len(statements) and statements[end].guard == guard:
            end += 1
        texts = [statement.text for statement in statements[position:end]]
        margin = _INDENT * indent
        if not guard:
            lines += _rows(texts, margin, packed)
        else:
            inline = f"{margin}if {guard}: {'; '.join(texts)}"
            if len(inline) <= WIDTH:
                lines.append(inline)
            else:
                lines.append(f"{margin}if {guard}:")
                lines += _rows(texts, margin + _INDENT, packed)
        position = end
    return lines


def _rows(texts: Sequence[str], margin: str, packed: bool) -> list[str]:
    rows: list[str] = []
    for text in texts:
        joined = f"{rows[-1]}; {text}" if packed and rows else ""
        if joined and len(joined) <= WIDTH:
            rows[-1] = joined
        else:
            rows.append(margin + text)
    return [line for row in rows for line in wrapped(row, margin)]


def wrapped(row: str, margin: str = "") -> list[str]:
    """Break a row that is too long after commas inside brackets."""
    lines: list[str] = []
    outside = 0
    while len(row) > WIDTH:
        depth, cut, inside = outside, 0, 0
        for position, character in enumerate(row[:WIDTH]):
            depth += (character in "([{") - (character in ")]}")
            if depth > 0 and character == "," and row[position + 1] == " ":
                cut, inside = position + 1, depth
        if cut == 0:
            raise Unwritable("a line is too long")
        outside = inside
        lines.append(row[:cut])
        row = margin + _INDENT + row[cut + 1 :]
    return [*lines, row]
