"""From the programs of all ranks to one: pruned, simplified, aligned call by call.

Requirement: TP=1 and every rank of TP=N run almost the same calls, so a reader should see them
once, with what differs marked. Alignment decides only how short the result is: whatever is not
common to all stays guarded by the programs it belongs to, so the merged program does what each did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from tpcheck.observation.program import (
    COLLECTIVES,
    CONSTANT,
    COPIES,
    INPUT,
    WEIGHT,
    Constant,
    Ref,
    Sequence_,
    Slice,
    Step,
)


@dataclass(frozen=True, slots=True)
class Flow:
    """One rank's program: steps in order, what it returns, and how many ranks there are."""

    steps: tuple[Step, ...]
    root: Any
    size: int

    @property
    def written(self) -> set[int]:
        """The storages that are changed in place: there order and copies matter."""
        return {storage for step in self.steps for storage in step.writes}


@dataclass(frozen=True, slots=True)
class Slot:
    """One line of the merged program: program number -> its step; refs point to slots."""

    steps: Mapping[int, Step]

    @property
    def any(self) -> Step:
        """The step of the first program that has one."""
        return next(iter(self.steps.values()))


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a tree of arguments with every leaf changed."""
    if isinstance(tree, tuple):
        return tuple(mapped(item, change) for item in tree)
    if isinstance(tree, Sequence_):
        return Sequence_(mapped(tree.items, change))
    if isinstance(tree, Slice):
        return Slice(*mapped((tree.start, tree.stop, tree.step), change))
    return change(tree)


def leaves(tree: Any) -> Iterator[Any]:
    """Yield every leaf of a tree of arguments."""
    found: list[Any] = []
    mapped(tree, found.append)
    yield from found


def refs(tree: Any) -> Iterator[Ref]:
    """Yield every reference in a tree of arguments."""
    return (leaf for leaf in leaves(tree) if isinstance(leaf, Ref))


def with_refs(step: Step, change: Callable[[Any], Any]) -> Step:
    """Return a step with every leaf of its arguments changed."""
    return replace(
        step, arguments=mapped(step.arguments, change), keywords=mapped(step.keywords, change)
    )


def pruned(flows: Sequence[Flow]) -> list[Flow]:
    """Return only what the roots depend on; flows that return nothing keep every collective.

    A collective that one rank needs stays on every rank: they meet in it.
    """
    kept: dict[int, set[int]] = {flow.size: set() for flow in flows}
    while True:
        lives = [_live(flow, kept[flow.size]) for flow in flows]
        found: dict[int, set[int]] = {size: set() for size in kept}
        for flow, live in zip(flows, lives, strict=True):
            calls = [i for i, step in enumerate(flow.steps) if step.function in COLLECTIVES]
            found[flow.size] |= {k for k, index in enumerate(calls) if index in live}
        if found == kept:
            return [
                _renumbered(flow, sorted(live)) for flow, live in zip(flows, lives, strict=True)
            ]
        kept = found


def _live(flow: Flow, calls: set[int]) -> set[int]:
    """Return the steps that the root and these collectives, counted in order, depend on."""
    live: set[int] = set()
    storages: set[int] = set()

    def need(tree: Any) -> None:
        for ref in refs(tree):
            live.add(ref.step)
            storages.update(flow.steps[ref.step].holds)

    need(flow.root)
    left = sum(step.function in COLLECTIVES for step in flow.steps)
    for index in range(len(flow.steps) - 1, -1, -1):
        step = flow.steps[index]
        left -= step.function in COLLECTIVES
        called = step.function in COLLECTIVES and (left in calls or flow.root is None)
        failed = step.raises and flow.root is None
        if index in live or called or failed or storages & set(step.writes):
            live.add(index)
            storages.update(step.writes)
            need((step.arguments, step.keywords))
    return live


def _renumbered(flow: Flow, kept: Sequence[int]) -> Flow:
    numbers = {old: new for new, old in enumerate(kept)}

    def move(leaf: Any) -> Any:
        return replace(leaf, step=numbers[leaf.step]) if isinstance(leaf, Ref) else leaf

    steps = tuple(with_refs(flow.steps[index], move) for index in numbers)
    return Flow(steps, mapped(flow.root, move), flow.size)


def simplified(flow: Flow) -> Flow:
    """Return a flow without copies and repeated calls; tensors by value become steps of their own.

    Where something is written in place a copy means something, and stays.
    """
    written = flow.written
    steps: list[Step] = []
    made: dict[Any, int] = {}
    now: dict[Ref, Any] = {}

    def clean(step: Step) -> bool:
        read = {storage for ref in refs(step.arguments) for storage in steps[ref.step].holds}
        alone = step.function not in COLLECTIVES  # ranks meet as often as they call
        return alone and not written & (read | set(step.holds) | set(step.writes))

    def place(step: Step) -> int:
        key = (step.function, step.arguments, step.keywords)
        known = made.get(key) if clean(step) else None
        if known is None:
            known = made[key] = len(steps)
            steps.append(step)
        return known

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Constant) and len(leaf.values) > 1:
            return Ref(place(Step(CONSTANT, (leaf,))))
        if not isinstance(leaf, Ref):
            return leaf
        if leaf in now:
            return now[leaf]
        return replace(leaf, step=now[Ref(leaf.step)].step)

    for index, old in enumerate(flow.steps):
        step = with_refs(old, move) if old.function != CONSTANT else old
        copy = step.function.lstrip(".=") in COPIES
        if copy and step.same and isinstance(step.arguments[0], Ref) and clean(step):
            now[Ref(index)] = step.arguments[0]
            continue
        now[Ref(index)] = Ref(place(step))
    return _constants_first(Flow(tuple(steps), mapped(flow.root, move), flow.size))


def _constants_first(flow: Flow) -> Flow:
    """Values first: where a rank uses one first is no reason to write it twice."""
    order = sorted(range(len(flow.steps)), key=lambda i: flow.steps[i].function != CONSTANT)
    return _renumbered(flow, order)


def aligned(flows: Sequence[Flow]) -> tuple[list[Slot], dict[int, Any]]:
    """Return the merged program and what each program returns of it."""
    order: list[dict[int, int]] = []
    keys: list[Any] = []
    for number, flow in enumerate(flows):
        mine = _keys(flow)
        merged: list[dict[int, int]] = []
        merged_keys: list[Any] = []
        matcher = SequenceMatcher(None, keys, mine, autojunk=False)
        for tag, a, b, c, d in matcher.get_opcodes():
            same = tag == "equal"
            for i in range(a, b):
                merged.append(order[i] | ({number: c + i - a} if same else {}))
            for j in range(c, d) if not same else ():
                merged.append({number: j})
            merged_keys += keys[a:b] + ([] if same else mine[c:d])
        order, keys = merged, merged_keys
    place = {
        (number, index): slot for slot, held in enumerate(order) for number, index in held.items()
    }

    def move(number: int) -> Callable[[Any], Any]:
        return lambda leaf: (
            replace(leaf, step=place[number, leaf.step]) if isinstance(leaf, Ref) else leaf
        )

    slots = [
        Slot({p: with_refs(flows[p].steps[i], move(p)) for p, i in sorted(held.items())})
        for held in order
    ]
    roots = {p: mapped(flow.root, move(p)) for p, flow in enumerate(flows)}
    return _without_views_of_all(slots, roots)


def _without_views_of_all(
    slots: Sequence[Slot], roots: Mapping[int, Any]
) -> tuple[list[Slot], dict[int, Any]]:
    """Drop the calls that hand on what they are given in every program that makes them."""
    now: dict[tuple[int, Ref], Ref] = {}
    kept: list[Slot] = []

    def move(p: int) -> Callable[[Any], Any]:
        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if (p, leaf) in now:
                return now[p, leaf]
            return replace(leaf, step=now[p, Ref(leaf.step)].step)

        return moved

    for number, slot in enumerate(slots):
        steps = {p: with_refs(step, move(p)) for p, step in slot.steps.items()}
        if all(_hands_on(step) for step in steps.values()):
            now |= {(p, Ref(number)): s.arguments[0] for p, s in steps.items()}
            continue
        now |= {(p, Ref(number)): Ref(len(kept)) for p in steps}
        kept.append(Slot(steps))
    return kept, {p: mapped(root, move(p)) for p, root in roots.items()}


def _hands_on(step: Step) -> bool:
    copy = step.function.lstrip(".=") in COPIES
    return step.same and not copy and isinstance(step.arguments[0], Ref)


def _keys(flow: Flow) -> list[Any]:
    """Return what makes a step the same step in another program: its call and its weights."""
    origins: list[frozenset[str] | None] = []
    keys: list[Any] = []
    for step in flow.steps:
        used = [origins[ref.step] for ref in refs((step.arguments, step.keywords))]
        known = [origin for origin in used if origin is not None]
        if step.function == WEIGHT:
            origin: frozenset[str] | None = frozenset([str(step.arguments[0])])
        elif step.function == INPUT or step.function in COLLECTIVES or len(known) < len(used):
            origin = None
        else:
            origin = frozenset().union(*known)
        origins.append(origin)
        exact = step.function in (WEIGHT, INPUT)
        kind = (lambda leaf: leaf) if exact else lambda leaf: _kind(leaf, origins)
        keys.append((step.function, mapped((step.arguments, step.keywords), kind)))
    return keys


def _kind(leaf: Any, origins: Sequence[Any]) -> Any:
    if isinstance(leaf, Ref):
        return origins[leaf.step]
    if isinstance(leaf, Constant):
        return (leaf.dtype, len(leaf.shape))
    if isinstance(leaf, bool) or leaf is None or isinstance(leaf, str):
        return leaf
    return type(leaf).__name__


def uses(
    slots: Iterable[Slot], roots: Mapping[int, Any]
) -> tuple[dict[int, int], dict[int, set[int]]]:
    """Return in how many places of the merged program each slot is written, and by whom."""
    places: dict[int, set[Any]] = {}
    users: dict[int, set[int]] = {}

    def note(where: Any, program: int, tree: Any) -> None:
        for path, leaf in enumerate(leaves(tree)):
            if isinstance(leaf, Ref):
                places.setdefault(leaf.step, set()).add((where, path))
                users.setdefault(leaf.step, set()).add(program)

    for number, slot in enumerate(slots):
        for program, step in slot.steps.items():
            note(number, program, (step.arguments, step.keywords))
    for program, root in roots.items():
        note("root", program, root)
    return {slot: len(found) for slot, found in places.items()}, users
