"""What to show of the recorded programs: the whole of them, or one module on one input.

Requirement: a whole model does not fit a page, a module does. A module is cut out by its input and
output: it starts from a seeded tensor, lying on the ranks as its declared placement says, and its
output is made whole again, so that TP=N can be compared with TP=1 as the logits would be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tpcheck.observation.program import INPUT, Constant, ModuleMark, Program, Ref, Slice, Step
from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices
from tpcheck.repro.alignment import Flow, Slot, aligned, mapped, pruned, simplified, with_refs
from tpcheck.repro.values import Unwritable, literal

Key = tuple[Any, ...]
_LITERAL = 4
"""Elements up to which a floating input is written out; token ids always are."""


@dataclass(frozen=True, slots=True)
class View:
    """A merged program, and name and text of every input it starts from.

    places: (n, r) of every program; TP=1 comes first, and is left out where ranks never end.
    given, weights: the recorded values of inputs and weights. same_start: all
    programs were recorded on those.
    """

    title: str
    slots: Sequence[Slot]
    roots: Mapping[int, Any]
    places: Sequence[tuple[int, int]]
    inputs: Mapping[Key, tuple[str, str]]
    given: Mapping[Key, torch.Tensor] = field(default_factory=dict)
    weights: Mapping[Key, torch.Tensor] = field(default_factory=dict)
    same_start: bool = True

    def result(self, program: int) -> torch.Tensor | None:
        """Return what a program was recorded to return, where that is known."""
        root = self.roots[program]
        if not isinstance(root, Ref) or root.index >= 0:
            return None
        made: torch.Tensor | None = self.slots[root.step].steps[program].result
        return made

    @property
    def shapes_differ(self) -> bool:
        """Whether the results are not known to have one shape."""
        results = {p: self.result(p) for p in self.roots}
        return len({p if made is None else made.shape for p, made in results.items()}) > 1

    @property
    def writes(self) -> bool:
        """Whether something is changed in place."""
        return any(step.writes for slot in self.slots for step in slot.steps.values())


def whole_view(
    title: str,
    programs: Sequence[Program],
    output: str,
    inputs: Mapping[str, tuple[torch.Tensor, ...]],
    *,
    everything: bool = False,
) -> View:
    """Return what leads to an output; with output "", to every collective up to a failure.

    Args:
        everything: leave in what leads nowhere: it may be what another rank should have used.
    """
    flows = [
        simplified(Flow(tuple(p.steps), p.outputs[output] if output else None, p.size))
        for p in programs
    ]
    return _view(title, flows if everything else pruned(flows), programs, inputs)


def _view(
    title: str,
    flows: Sequence[Flow],
    programs: Sequence[Program],
    inputs: Mapping[str, tuple[torch.Tensor, ...]],
) -> View:
    slots, roots = aligned(flows)
    inputs = {**inputs, **{name: (t,) for p in programs for name, t in p.unknown.items()}}
    places = [(p.size, p.rank) for p in programs]
    given = {(name, i): t for name, tensors in inputs.items() for i, t in enumerate(tensors)}
    weights = {name: tensor for p in programs for name, tensor in p.weights.items()}
    return View(title, slots, roots, places, _texts(inputs), given, weights)


def module_view(
    title: str,
    programs: Sequence[Program],
    fqn: str,
    inputs: Mapping[str, tuple[torch.Tensor, ...]],
) -> View:
    """Return a module between its input and its output.

    Raises:
        Unwritable: it is not known how they lie on the ranks.
    """
    marks = [program.modules[fqn] for program in programs]
    parts = [_module_flow(program, fqn, marks[0]) for program in programs]
    outputs = [
        flow.steps[flow.root.step].result if flow.root.index < 0 else None for flow, _ in parts
    ]
    flows = [
        _joined(flow, lies, p, outputs) for (flow, lies), p in zip(parts, programs, strict=True)
    ]
    view = _view(title, pruned(flows), programs, inputs)
    if not marks[0].floating:
        return view
    starts = [_made(p, mark.input) for p, mark in zip(programs, marks, strict=True)]
    first = starts[0]
    if first is None:
        raise Unwritable(f"{fqn}: its input is one of several results of a call")
    start = seeded(marks[0].input_shape, 0, first.dtype)
    whole = all(mark.in_placement == Replicate() for mark in marks)
    same = whole and all(t is not None and torch.equal(t, first) for t in starts)
    return replace(
        view,
        inputs={**view.inputs, ("X", 0): ("X", start)},
        given={**view.given, ("X", 0): first},
        same_start=same,
    )


def _made(program: Program, ref: Any) -> torch.Tensor | None:
    made: torch.Tensor | None = program.steps[ref.step].result if ref.index < 0 else None
    return made


def seeded(shape: Sequence[int], seed: int, dtype: torch.dtype) -> str:
    """Return the text of a tensor of normal values."""
    cast = ".double()" if dtype == torch.float64 else f".to({dtype})"
    return f"torch.randn({tuple(shape)}, generator=torch.Generator().manual_seed({seed})){cast}"


def _texts(inputs: Mapping[str, tuple[torch.Tensor, ...]]) -> dict[Key, tuple[str, str]]:
    """Return name and text of every input; one that nobody declared is called c."""
    texts: dict[Key, tuple[str, str]] = {}
    counts: defaultdict[str, int] = defaultdict(int)
    for name, tensors in inputs.items():
        for position, tensor in enumerate(tensors):
            base = "C" if name != "A" else "x0" if tensor.dtype.is_floating_point else "ids"
            count = counts[base]
            counts[base] += 1
            texts[name, position] = (f"{base}{count or ''}", _input(tensor))
    return texts


def _input(tensor: torch.Tensor) -> str:
    if tensor.dtype.is_floating_point and tensor.numel() > _LITERAL:
        return seeded(tensor.shape, 0, tensor.dtype)
    values = tuple(tensor.reshape(-1).tolist())
    return literal(Constant(tuple(tensor.shape), str(tensor.dtype), values))[0]


def _module_flow(program: Program, fqn: str, alone: ModuleMark) -> tuple[Flow, Placement]:
    mark = program.modules[fqn]
    if not isinstance(mark.input, Ref) or not isinstance(mark.output, Ref):
        raise Unwritable(f"{fqn}: its input or output depends on nothing")
    flow = simplified(Flow(tuple(program.steps), (mark.input, mark.output), program.size))
    start, end = flow.root
    if mark.floating:
        placement = mark.in_placement or _guessed(mark.input_shape, alone.input_shape, fqn)
        before, first = _cut(placement, program)
        shift = len(before)

        def move(leaf: Any) -> Any:
            if leaf == start:
                return first
            return Ref(leaf.step + shift, leaf.index) if isinstance(leaf, Ref) else leaf

        steps = (*before, *(with_refs(step, move) for step in flow.steps))
        flow = Flow(steps, mapped(end, move), program.size)
    else:
        flow = Flow(flow.steps, end, program.size)
    placement = mark.out_placement or _guessed(mark.output_shape, alone.output_shape, fqn)
    return flow, placement


def _cut(placement: Placement, program: Program) -> tuple[list[Step], Ref]:
    """Return the steps that make a rank's part of the whole input X, and what they make."""
    steps = [Step(INPUT, ("X", 0))]
    if isinstance(placement, Replicate):
        return steps, Ref(0)
    if isinstance(placement, Shard):
        steps.append(Step(".chunk", (Ref(0), program.size, placement.dim), many=True))
        return steps, Ref(1, program.rank)
    if isinstance(placement, Slices) and len(placement.pieces) == 1:
        index = tuple(Slice(part.start, part.stop, part.step) for part in placement.pieces[0][1])
        steps.append(Step(".__getitem__", (Ref(0), index)))
        return steps, Ref(1)
    raise Unwritable(f"an input that lies on the ranks as {placement}")


def _joined(
    flow: Flow, placement: Placement, program: Program, outputs: Sequence[torch.Tensor | None]
) -> Flow:
    """Return a flow whose result is the whole output on every rank; outputs[0] is TP=1's."""
    local = [output for output in outputs[1:] if output is not None]
    known = len(local) == len(outputs) - 1
    if program.size == 1 or isinstance(placement, Replicate):
        return flow
    if isinstance(placement, Shard):
        whole = torch.cat(local, placement.dim) if known else None
        step = Step("all_gather", (flow.root, placement.dim), result=whole)
    elif isinstance(placement, Partial):
        step = Step("all_reduce", (flow.root, placement.op))
    else:
        raise Unwritable(f"an output that lies on the ranks as {placement}")
    return Flow((*flow.steps, step), Ref(len(flow.steps)), program.size)


def _guessed(local: Sequence[int], whole: Sequence[int], fqn: str) -> Placement:
    """Return how a tensor whose placement nobody declared lies on the ranks, by its shape."""
    differing = [d for d, (a, b) in enumerate(zip(local, whole, strict=False)) if a != b]
    if len(local) != len(whole) or len(differing) > 1:
        raise Unwritable(f"{fqn}: shape {list(local)} is no part of {list(whole)}")
    return Shard(differing[0]) if differing else Replicate()
