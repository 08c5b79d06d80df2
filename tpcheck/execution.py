"""execute(world, task) -> Trace: the only place where a subject runs.

Requirement: whatever the question is (is it the same function, how far did it drift, where does it
diverge), one rank does the same thing: build the subject once, call it on inputs that are the same
at every degree, and hand back outputs, digests and what it saw on the way. It never judges.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from tpcheck.errors import SubjectError
from tpcheck.groups.base import Interceptor, RecordedGroup
from tpcheck.groups.jobs import World
from tpcheck.observation.codes import CastKey, Codes
from tpcheck.observation.consumption import Consumption, offer_weights, one_ulp_off
from tpcheck.observation.dispatch import Choice, Watch
from tpcheck.observation.eagerly import Eagerly
from tpcheck.observation.injection import reduction_noise
from tpcheck.observation.last_bits import LastBits
from tpcheck.observation.lifting import Lift
from tpcheck.observation.modules import (
    ModuleTracer,
    evaluating,
    fqn_hooks,
    replay_modules,
    traced_modules,
)
from tpcheck.observation.own_calls import OwnCalls, sums_of
from tpcheck.observation.planting import Plant, Planter
from tpcheck.observation.program import Program
from tpcheck.observation.recording import Recording
from tpcheck.observation.whereabouts import building, running
from tpcheck.outputs import beside, checked_shards, decoded, plain_copy, whole
from tpcheck.spec import ModelSpec
from tpcheck.subjects import Subject, SubjectRef, resolve, with_spec
from tpcheck.trace import Trace

AGAIN = "A again"
"""The output of the repeated input, the first that has other bits than A's; none should."""

_Context = contextlib.AbstractContextManager[Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One build of a subject and the forwards to run on it.

    inputs: input id -> arguments of forward. order: the ids to run; repeated, "A" is stored as "A
    again". watch: see casts, choices and torch.distributed calls; watch_all: in every forward,
    whatever the first one showed. perturb_seed: move narrow casts by half an ulp. perturb_weights:
    move weights by half an ulp of the compute dtype; other_weights: by an ulp of the storage dtype,
    alike in every compute dtype. last_bits: move the operands of every op of `dtype` by an ulp
    (observation/last_bits.py). lift: compute in `dtype` what the subject would compute in a
    narrower one, in its "forward" or in "all" it does; lift_codes: its quantizers too
    (observation/lifting.py). noise_dtype: add to every reduction the rounding this dtype must cost.
    codes: TP=1's quantizers; sent: input id -> the casts that are a reduction's
    (observation/codes.py). intercept: makes what watches or replaces collectives; its `seen`
    becomes an extra. own_calls: hand it the sums that the subject asks of torch.distributed itself,
    too; real ranks only. pinned: input id -> choices to impose on top-k. trace: input id whose
    modules are recorded; replay: reference inputs by FQN for modules with declared placements.
    """

    subject: SubjectRef
    seed: int
    dtype: str
    weight_dtype: str
    inputs: Mapping[str, tuple[torch.Tensor, ...]]
    order: tuple[str, ...]
    spec: ModelSpec | None = None
    watch: bool = False
    watch_all: bool = False
    perturb_seed: int | None = None
    perturb_weights: int | None = None
    other_weights: int | None = None
    last_bits: int | None = None
    lift: str = ""
    lift_codes: Mapping[str, Collection[int]] = field(default_factory=dict)
    noise_dtype: str = ""
    noise_kind: str = "ring"
    codes: tuple[CastKey, ...] | None = None
    sent: Mapping[str, Collection[int]] = field(default_factory=dict)
    intercept: Callable[[], Interceptor] | None = None
    own_calls: bool = False
    pinned: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    trace: str = ""
    until: str = ""
    replay: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shards: bool = False
    decode: bool = False
    every_output: bool = False


def execute(world: World, task: Task) -> Trace:
    """Build the task's subject on this rank and run its forwards in order.

    Raises:
        SubjectError: the subject breaks its own declaration (no callable, no tensor, other shapes).
        Exception: whatever the subject raises.
    """
    with torch.no_grad():
        group = _group(world, task)
        subject, forward, consumption = _built(group, task)
        return _Runner(subject, group, forward, task).everything(consumption)


def execute_planted(world: World, work: tuple[Task, Sequence[Plant]]) -> list[Trace]:
    """Run a task once for each fault planted in it; faults of collectives share one build.

    Raises:
        Exception: whatever a planted fault makes the subject raise.
    """
    task, plants = work
    traces: list[Trace] = []
    reusable = False
    with torch.no_grad():
        for plant in plants:
            in_weight = isinstance(plant.site, str)
            if in_weight or not reusable:
                group = _group(world, task)
                planter = Planter(group, plant)
                subject, forward, consumption = _built(group, task)
            reusable = not in_weight
            with planter.planted(plant, real_ranks=world.backend != "sim"):
                trace = _Runner(subject, group, forward, task).everything(consumption)
            traces.append(replace(trace, extras={"survey": planter.survey()}))
    return traces


def execute_in_turn(world: World, tasks: Sequence[Task]) -> list[Trace]:
    """Run tasks that differ in what they run, not in what they build, on one build.

    Raises:
        Exception: whatever the subject raises.
    """
    with torch.no_grad():
        group = _group(world, tasks[0])
        subject, forward, consumption = _built(group, tasks[0])
        return [_Runner(subject, group, forward, task).everything(consumption) for task in tasks]


def execute_recorded(world: World, work: tuple[Task, list[Program]]) -> Trace:
    """Run a task as `execute` does and append this rank's program to the list. Simulated only.

    Raises:
        Exception: whatever the subject raises; the program then ends there.
    """
    task, programs = work
    with torch.no_grad():
        group = _group(world, task)
        with Recording(group, task.inputs, programs) as recording:
            subject, forward, consumption = _built(group, task)
            recording.mark(traced_modules(forward))
            trace = _Runner(subject, group, forward, task).everything(consumption)
            recording.finish(trace.outputs)
    return trace


def _group(world: World, task: Task) -> RecordedGroup:
    dtype, weight_dtype = getattr(torch, task.dtype), getattr(torch, task.weight_dtype)
    group = world.group(seed=task.seed, dtype=dtype, weight_dtype=weight_dtype)
    return cast(RecordedGroup, group)


def _built(group: RecordedGroup, task: Task) -> tuple[Subject, Any, Consumption]:
    subject = resolve(task.subject)
    if task.spec is not None:
        subject = with_spec(subject, task.spec)
    _seed(task.seed, group.device)
    consumption = Consumption(group.weights)
    if task.perturb_weights is not None:
        group.weights.perturb = consumption.half_ulp(task.perturb_weights)
    if task.other_weights is not None:
        group.weights.perturb = one_ulp_off(task.other_weights, group.weight_dtype)
    offer_weights(group.weights, subject.options.weights)
    with Lift(group.recorder, group.dtype) if task.lift == "all" else contextlib.nullcontext():
        return subject, _build(subject, group, consumption), consumption


def _seed(seed: int, device: torch.device) -> None:
    """Seed as torch.manual_seed does, without its millisecond of queueing for absent devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _build(subject: Subject, group: RecordedGroup, consumption: Consumption) -> Any:
    arguments: tuple[Any, ...] = (group,)
    if subject.options.specs is not None and subject.options.spec is not None:
        arguments = (group, subject.options.spec)
    offered = subject.options.weights is not None
    watching = consumption.watching() if offered else contextlib.nullcontext()
    with watching, building(subject.name):
        forward = subject.build(*arguments)
    if not callable(forward):
        raise SubjectError(
            f"{subject.name}: build(tp) returned {type(forward).__name__},"
            " but should return a callable forward(inputs) -> logits"
        )
    return evaluating(forward)


class _Runner:
    """One built subject and everything a task asks of it."""

    def __init__(self, subject: Subject, group: RecordedGroup, forward: Any, task: Task) -> None:
        self._subject = subject
        self._group = group
        self._forward = forward
        self._task = task
        self._outputs: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._collectives: dict[str, tuple[Any, ...]] = {"build": group.recorder.take()}
        self._choices: dict[str, list[Choice]] = {}
        self._casts: dict[CastKey, Any] = {}
        self._codes: dict[CastKey, None] = {}
        self._sent: dict[str, set[int]] = {}
        self._code_places: dict[str, tuple[list[CastKey], set[int]]] = {}
        self._unpinned = 0
        self._quiet = True
        self._eagerly = Eagerly()
        self._extras: dict[str, Any] = {}
        asked = task.own_calls and group.size > 1
        self._own_calls = OwnCalls(group, sums_of(group)) if asked else None

    def everything(self, consumption: Consumption) -> Trace:
        task = self._task
        if task.noise_dtype:
            self._group.interceptor = reduction_noise(task.noise_dtype, task.noise_kind, task.seed)
        if task.intercept is not None:
            self._group.interceptor = task.intercept()
        for input_id in task.order:
            ran = input_id in self._collectives
            self._run(f"{input_id} again" if ran else input_id, self._forward, input_id)
        if task.decode and hasattr(self._forward, "prefill") and hasattr(self._forward, "step"):
            decode = functools.partial(decoded, self._forward)
            if "B" in task.inputs:  # another request, whose leftovers in a cache must not show
                with self._own_calls or contextlib.nullcontext():
                    decode(*self._arguments("B"))
                self._group.recorder.take()
            self._run("decode", decode, "A")
        if task.trace:
            with self._eagerly:
                self._trace_modules()
        if task.shards and hasattr(self._forward, "shards"):
            self._extras["shards"] = checked_shards(self._forward.shards())
        self._extras["lift"] = task.lift
        self._extras["codes"] = tuple(self._codes)
        self._extras["quiet"] = self._quiet
        self._extras["sent"] = self._sent
        self._extras["code_places"] = self._code_places
        self._extras["choices"] = self._choices
        self._extras["unpinned"] = self._unpinned
        self._extras["consumed"] = consumption.counts()
        self._extras["own_calls"] = self._group.lent or any(
            call.detail == "torch.distributed"
            for calls in self._collectives.values()
            for call in calls
        )
        self._extras["missed"] = {} if self._own_calls is None else self._own_calls.missed
        self._extras["seen"] = getattr(self._group.interceptor, "seen", None)
        return Trace(
            rank=self._group.rank,
            outputs=self._outputs,
            digests=self._digests,
            collectives=self._collectives,
            casts=tuple(self._casts.values()),
            facts=self._facts(),
            extras=self._extras,
        )

    def _facts(self) -> dict[str, Any]:
        """What carried the run, and what the subject says of itself."""
        return {
            "device": str(self._group.device),
            "compiled": False,
            "compiler_bypassed": self._eagerly.compiled,
            "threads_per_rank": torch.get_num_threads(),
            "not_compared": self._extras.get("beside", 0),
        } | dict(getattr(self._forward, "facts", None) or {})

    def _run(self, name: str, function: Callable[..., Any], input_id: str) -> None:
        arguments = self._arguments(input_id)  # out here: rounding them is no cast of the subject's
        # Inside the mode that hands calls on, the watching one does not see what that does to them.
        own_calls = self._own_calls or contextlib.nullcontext()
        within = running(self._group, name, arguments)
        watching, (moving, lifting) = self._watching(name, input_id), self._altered(name)
        with self._eagerly, within, own_calls, watching, moving, lifting:
            output = self._checked(name, function(*arguments))
        self._collectives[name] = self._group.recorder.take()
        if output is None:
            return
        if name == AGAIN and self._digests.get(AGAIN, self._digests["A"]) != self._digests["A"]:
            return  # one with other bits is enough, and this may have A's
        self._digests[name] = self._group.digest(name, output)
        if self._group.rank == 0 or self._task.every_output:
            self._outputs[name] = output

    def _watching(self, name: str, input_id: str) -> _Context:
        needed = self._needs_watching(name)
        return self._watched(name, input_id) if needed else contextlib.nullcontext()

    @contextlib.contextmanager
    def _watched(self, name: str, input_id: str) -> Iterator[None]:
        task, generator = self._task, None
        if task.perturb_seed is not None:
            generator = torch.Generator().manual_seed(task.perturb_seed * 1009 + self._group.rank)
        pinned = task.pinned.get(input_id)
        watch = Watch(
            self._group.recorder,
            wanted=self._group.dtype,
            perturb=generator,
            codes=Codes(task.codes, task.sent.get(name, ())),
            pinned=pinned,
            rank=self._group.rank,
        )
        with fqn_hooks(self._forward, self._group), watch:
            yield
        if watch.choices:
            self._choices[name] = watch.choices
        self._unpinned += watch.unpinned
        self._codes |= watch.codes.found
        self._sent[name] = watch.codes.sent
        if watch.codes.casts:
            self._code_places[name] = (watch.codes.casts, watch.codes.reaching)
        self._quiet = self._quiet and not watch.saw_something
        for cast_ in watch.casts:
            self._casts.setdefault((cast_.fqn, cast_.source, cast_.target), cast_)

    def _altered(self, name: str) -> tuple[_Context, _Context]:
        """Return what alters the arithmetic of a forward as the task asks, not what it computes.

        One within the other: casts are lifted before last bits are moved.
        """
        group, task, none = self._group, self._task, contextlib.nullcontext()
        bits, codes = task.last_bits, task.lift_codes.get(name, ()) if group.size > 1 else ()
        moving = none if bits is None else LastBits(group.recorder, group.dtype, bits)
        lifting = Lift(group.recorder, group.dtype, codes=codes) if task.lift else none
        return moving, lifting

    def _needs_watching(self, name: str) -> bool:
        """Watching costs Python for every op: stop once the first forward showed nothing.

        One token is watched too, because code branches there; decoding repeats what forward does.
        """
        task = self._task
        if task.pinned or task.perturb_seed is not None:
            return True
        first = name in (task.order[0], "A", "t1") or task.watch_all
        return task.watch and name != "decode" and (first or not self._quiet)

    def _arguments(self, input_id: str) -> list[torch.Tensor]:
        return [self._prepared(tensor) for tensor in self._task.inputs[input_id]]

    def _prepared(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self._group.device)
        if tensor.dtype.is_floating_point:
            tensor = tensor.to(self._group.weight_dtype).to(self._group.dtype)
        return tensor.clone()  # simulated ranks share the task; a subject may write to its inputs

    def _checked(self, name: str, output: Any) -> torch.Tensor | None:
        self._extras["beside"], output = beside(output), whole(output)
        if output is None and self._subject.options.logits == "rank0" and self._group.rank > 0:
            return None
        if not isinstance(output, torch.Tensor):
            raise SubjectError(
                f"{self._subject.name}: forward({name}) returned {type(output).__name__} on rank"
                f" {self._group.rank}, but should return a tensor"
                + ("" if self._group.rank == 0 else ' (or declare logits="rank0")')
            )
        return plain_copy(output)

    def _trace_modules(self) -> None:
        task = self._task
        points = traced_modules(self._forward)
        tracer = ModuleTracer(points, self._group, until=task.until)
        # Held to the same choices as the outputs: a flip would be taken for drift.
        pinned = task.pinned.get(task.trace)
        watch = Watch(self._group.recorder, pinned=pinned, rank=self._group.rank)
        arguments = self._arguments(task.trace)
        moving, lifting = self._altered(task.trace)
        with tracer, self._own_calls or contextlib.nullcontext():
            with watch if pinned else contextlib.nullcontext(), moving, lifting:
                self._forward(*arguments)
        self._group.recorder.take()
        self._extras["points"] = tracer.records
        self._extras |= {"outside": tracer.outside, "calls": tracer.calls}
        if task.replay:
            self._extras["replayed"] = replay_modules(points, task.replay, self._group, tracer)
