"""A shorter program: it starts from tensors on which TP=1 and TP=N still agree.

Requirement: what led up to the divergence is right and only fills the page. A tensor that every
rank holds whole, holds a piece of, or holds a term of, and that is TP=1's by that reading, is
replaced by seeded numbers lying on the ranks in the same way; what comes after stays as recorded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpcheck.observation.program import COLLECTIVES, INPUT, Constant, Ref, Step
from tpcheck.repro.alignment import Slot, mapped, refs, with_refs
from tpcheck.repro.values import literal
from tpcheck.repro.views import View, seeded

_AGREE = 1e-12
_LITERAL = 4


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A tensor to start from. lies: "whole", "term", or the dim it is cut along."""

    lies: str | int
    value: torch.Tensor


def cut_view(view: View, *, pieces: bool, target: int | None = None) -> View:
    """Return the part of a view that follows the last tensors on which all programs agree.

    Args:
        pieces: start from tensors that ranks hold pieces or terms of, too.
        target: a slot to end at; the view's own result by default.

    """
    everyone = set(range(len(view.places)))
    roots = view.roots if target is None else {p: Ref(target) for p in everyone}
    active = _active(view.slots)
    writers = _writers(view.slots)
    leaves: dict[int, _Leaf] = {}
    needed: set[int] = set()

    def need(number: int, *, start: bool) -> None:
        if number in needed:
            return
        needed.add(number)
        slot = view.slots[number]
        changed = {w for p, s in slot.steps.items() for at in s.holds for w in writers[p, at]}
        if start and number in active and not changed:
            leaf = _leaf(slot, view.places, pieces)
            if leaf is not None:
                leaves[number] = leaf
                return
        for writer in changed:
            need(writer, start=False)
        for step in slot.steps.values():
            for ref in refs((step.arguments, step.keywords)):
                need(ref.step, start=True)

    for root in roots.values():
        for ref in refs(root):
            need(ref.step, start=ref.step != target)
    if all(root is None for root in roots.values()):
        for number in _unmet(view.slots, everyone):
            need(number, start=False)
    return _rebuilt(view, roots, needed, leaves)


def differing_meetings(view: View) -> list[int]:
    """Return the collectives of all programs whose result is not TP=1's on some rank.

    A result of another shape is padded, and compared only once the padding is cut off.
    """
    everyone = set(range(len(view.places)))
    return [
        number
        for number, slot in enumerate(view.slots)
        if slot.any.function in COLLECTIVES
        and set(slot.steps) == everyone
        and len({s.result.shape for s in slot.steps.values() if s.result is not None}) == 1
        and _leaf(slot, view.places, False) is None
    ]


def _writers(slots: Sequence[Slot]) -> defaultdict[tuple[int, int], set[int]]:
    """Return which slots change a program's storage in place."""
    writers: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number, slot in enumerate(slots):
        for p, step in slot.steps.items():
            for storage in step.writes:
                writers[p, storage].add(number)
    return writers


def _active(slots: Sequence[Slot]) -> set[int]:
    """Return the slots that depend on an input: weights and values stay as they are."""
    active: set[int] = set()
    for number, slot in enumerate(slots):
        for step in slot.steps.values():
            made = (ref.step in active for ref in refs((step.arguments, step.keywords)))
            if step.function != INPUT and any(made):
                active.add(number)
            elif step.function == INPUT:
                active.add(number)
    return active


def _unmet(slots: Sequence[Slot], everyone: set[int]) -> list[int]:
    """Return the collectives in which ranks did not meet, and what was raised."""
    return [
        number
        for number, slot in enumerate(slots)
        if slot.any.raises
        or (slot.any.function in COLLECTIVES and set(slot.steps) != everyone)
        or (slot.any.function in COLLECTIVES and any(s.result is None for s in slot.steps.values()))
    ]


def _leaf(slot: Slot, places: Sequence[tuple[int, int]], pieces: bool) -> _Leaf | None:
    """Return how a slot's tensor lies on the ranks, None where it is not TP=1's in any way."""
    results = [step.result for step in slot.steps.values()]
    if len(results) < len(places) or any(r is None or r.numel() == 0 for r in results):
        return None
    alone = places[0][0] == 1
    whole, local = results[0], results[1:] if alone else results
    if all(_same(t, whole) and torch.equal(t, local[0]) for t in local):
        return _Leaf("whole", whole)
    if not pieces or not alone or len(local) < 2:
        return None
    if whole.dtype.is_floating_point and all(t.shape == whole.shape for t in local):
        return _Leaf("term", whole) if _same(sum(local), whole) else None
    for dim in range(whole.ndim):
        sizes = {t.shape[dim] for t in local if t.ndim == whole.ndim}
        fits = len(sizes) == 1 and sum(t.shape[dim] for t in local) == whole.shape[dim]
        rest = all(
            t.ndim == whole.ndim and t.movedim(dim, 0).shape[1:] == whole.movedim(dim, 0).shape[1:]
            for t in local
        )
        if fits and rest and _same(torch.cat(local, dim), whole):
            return _Leaf(dim, whole)
    return None


def _same(actual: Any, expected: torch.Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.dtype.is_floating_point:
        return bool((actual == expected).all())
    finite = expected.isfinite()
    if not bool((finite == actual.isfinite()).all()):
        return False
    error = (actual - expected)[finite].norm()
    return bool(error <= _AGREE * expected[finite].norm())


def _rebuilt(
    view: View, roots: Mapping[int, Any], needed: set[int], leaves: Mapping[int, _Leaf]
) -> View:
    inputs, given = dict(view.inputs), dict(view.given)
    slots: list[Slot] = []
    now: dict[tuple[int, int], Ref] = {}
    everyone = range(len(view.places))

    def move(p: int) -> Any:
        return lambda leaf: (
            replace(now[p, leaf.step], index=max(leaf.index, now[p, leaf.step].index))
            if isinstance(leaf, Ref)
            else leaf
        )

    def add(steps: Mapping[int, Step], number: int, index: int | Mapping[int, int] = -1) -> Ref:
        slots.append(Slot(dict(steps)))
        for p in steps:
            at = index if isinstance(index, int) else index[p]
            now[p, number] = Ref(len(slots) - 1, at)
        return Ref(len(slots) - 1)

    for number in sorted(needed):
        leaf = leaves.get(number)
        if leaf is None or view.slots[number].any.function == INPUT:
            held = view.slots[number].steps
            add({p: with_refs(step, move(p)) for p, step in held.items()}, number)
            continue
        key, count = ("X", number), len(inputs) - len(view.inputs)
        inputs[key] = (f"X{count or ''}", _text(leaf, view.places, count))
        given[key] = _value(leaf, view.slots[number])
        x = add({p: Step(INPUT, key) for p in everyone}, number)
        if leaf.lies == "term":
            add({0: Step(".sum", (x, 0))}, number)
            add({p: Step(".__getitem__", (x, view.places[p][1])) for p in everyone if p}, number)
        elif isinstance(leaf.lies, int):
            chunks = {p: Step(".chunk", (x, n, leaf.lies)) for p, (n, _) in enumerate(view.places)}
            add(chunks, number, {p: r for p, (_, r) in enumerate(view.places)})
    moved = {p: mapped(root, move(p)) for p, root in roots.items()}
    title = f"{view.title}, from where ranks agree" if leaves else view.title
    return View(title, slots, moved, view.places, inputs, given, view.weights)


def _value(leaf: _Leaf, slot: Slot) -> torch.Tensor:
    if leaf.lies != "term":
        return leaf.value
    return torch.stack([step.result for p, step in slot.steps.items() if p])


def _text(leaf: _Leaf, places: Sequence[tuple[int, int]], seed: int) -> str:
    value = leaf.value
    if value.dtype.is_floating_point and (value.numel() > _LITERAL or leaf.lies == "term"):
        size = max(n for n, _ in places)
        shape = (size, *value.shape) if leaf.lies == "term" else tuple(value.shape)
        return seeded(shape, seed, value.dtype)
    flat = tuple(value.reshape(-1).tolist())
    return literal(Constant(tuple(value.shape), str(value.dtype), flat))[0]
