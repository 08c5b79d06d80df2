"""The runs of one case in one deployed dtype: how each is asked for, and TP=1's, made once.

Requirement: TP=1 runs once for all degrees, and only when something asks for it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from tpcheck.comparison import relative
from tpcheck.evidence import distance
from tpcheck.execution import Task
from tpcheck.groups.jobs import Job, JobFailed, Ranks
from tpcheck.inputs import fewer_inputs, input_order, make_inputs
from tpcheck.numerics.drift import ASSUMED_ERROR
from tpcheck.numerics.ulp import eps
from tpcheck.observation.codes import CastKey
from tpcheck.observation.dispatch import Choice
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectRef
from tpcheck.trace import Trace

_NOISE_SEED = 1
_OF_THE_ORACLE = ("oracle", "noisy_alone", "_unsteady", "rebuilt")
"""What CaseRuns keeps of TP=1 in the oracle's dtype: made anew where its task changes."""


class CaseRuns:
    """Runs one case of a subject, at TP=1 and at any number of degrees."""

    def __init__(
        self,
        ranks: Ranks,
        ref: SubjectRef,
        subject: Subject,
        case: Case,
        dtype: str,
        tp_sizes: tuple[int, ...],
        timeout_s: float,
    ) -> None:
        self.subject = subject
        self.case = case
        self.dtype = dtype
        self.inputs = make_inputs(subject, case, tp_sizes)
        self.task = Task(
            subject=ref,
            seed=case.seed,
            dtype=dtype,
            weight_dtype=dtype,
            inputs=self.inputs,
            order=(),
            spec=subject.options.spec if subject.options.specs is not None else None,
        )
        self.notes: tuple[str, ...] = ()
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._deadline = math.inf

    @cached_property
    def oracle_dtype(self) -> str:
        """float64, or the widest the subject admits to, or nothing."""
        if self.subject.options.float64:
            return "float64"
        return "" if self.dtype == "float32" else "float32"

    @cached_property
    def oracle(self) -> Trace | None:
        """TP=1 in `oracle_dtype`; None where the subject has no wider run."""
        if self.subject.options.float64:
            return self._first(self.exact_task(self._all_lengths, alone=True))
        if not self.oracle_dtype:
            return None
        try:
            task = self.exact_task(self._all_lengths, alone=True)
            return self.run(replace(task, decode=False), 1)[0]
        except JobFailed:
            self.oracle_dtype = ""  # fixed-dtype kernels: TP=1 itself is all there is
            return None

    @cached_property
    def base(self) -> Trace:
        """TP=1 in the deployed dtype."""
        return self._first(self.deployed_task(self._all_lengths, shards=True))

    @cached_property
    def base_error_without_oracle(self) -> float | None:
        """TP=1's response to half an ulp in its own weights, where no wider run can be had."""
        if self.oracle is not None:
            return None
        task = replace(self.deployed_task(self._all_lengths), perturb_weights=_NOISE_SEED)
        moved = self.run(task, 1)[0]
        error, magnitude, _ = distance(moved, self.base)
        return max(error, ASSUMED_ERROR * eps(self.dtype) * magnitude)

    @cached_property
    def quantization_error(self) -> float | None:
        """How far quantization moved TP=1's output, relative to it; None where that is unknown.

        The same weights before and after, both in float64: no rank and no rounding is in it.
        """
        before = unquantized(self.subject, self.exact_task(("A",)))
        if before is None or not self.subject.options.float64 or self.oracle is None:
            return None
        moved = self.run(replace(before, decode=False, watch=False), 1)[0]
        error, magnitude, _ = distance(moved, self.oracle)
        return relative(error, magnitude)

    @cached_property
    def noisy_alone(self) -> Trace:
        """TP=1's `noisy_task`."""
        assert self.oracle is not None
        return self.run(replace(self.noisy_task, sent=self.oracle.extras["sent"]), 1)[0]

    @cached_property
    def _unsteady(self) -> list[Trace]:
        return []

    def unsteady(self, count: int) -> Sequence[Trace]:
        """Return TP=1 in `oracle_dtype` with its last bits moved, `count` times, each otherwise."""
        task = self.exact_task(tuple(self.inputs), alone=True)
        task = replace(task, decode=False, pinned=self.pinned)
        while len(self._unsteady) < count:
            moved = replace(task, last_bits=_NOISE_SEED + len(self._unsteady))
            self._unsteady.append(self.run(moved, 1)[0])
        return self._unsteady[:count]

    @cached_property
    def rebuilt(self) -> Trace:
        """TP=1 in `oracle_dtype` once more, after whatever was built before this is asked for."""
        task = self.exact_task(self._all_lengths, alone=True)
        return self.run(replace(task, decode=False), 1)[0]

    def watch_every_length(self) -> None:
        """From here on, look for casts and choices in the forward of every input."""
        self.task = replace(self.task, watch_all=True)
        for made in (*_OF_THE_ORACLE, "lifted", "lifted_in_forward"):
            vars(self).pop(made, None)

    @cached_property
    def lifted(self) -> CaseRuns | JobFailed:
        """These runs without the subject's own casts, in build and forward; why not, if TP=1 fails.

        They may hang where others do not, as ranks that send other dtypes: they get a quarter of a
        case's time.
        """
        return self._without_casts("all")

    @cached_property
    def lifted_in_forward(self) -> CaseRuns | JobFailed:
        """These runs without the casts of forward: of builds that pack or read bits."""
        return self._without_casts("forward")

    def _without_casts(self, lift: str) -> CaseRuns | JobFailed:
        lifted = copy.copy(self)
        for made in (*_OF_THE_ORACLE, "base"):
            vars(lifted).pop(made, None)
        lifted.task = replace(self.task, lift=lift)
        lifted._timeout_s = self._timeout_s / 4
        lifted.start_clock()
        try:
            assert lifted.oracle is not None
        except JobFailed as error:  # an op that refuses the wider dtype, or may not be given it
            return error
        return lifted

    def lifting(self, codes: Mapping[str, Collection[int]]) -> CaseRuns:
        """Return these runs, at TP=N without these quantizers as well: input id -> places."""
        runs = copy.copy(self)
        runs.task = replace(self.task, lift_codes=codes)
        return runs

    @property
    def pinned(self) -> Mapping[str, Sequence[Choice]]:
        """The oracle's choices by input, which deployed runs are held to."""
        return {} if self.oracle is None else self.oracle.extras["choices"]

    @property
    def codes(self) -> tuple[CastKey, ...]:
        """The quantizers of the oracle's forward."""
        codes: tuple[CastKey, ...] = () if self.oracle is None else self.oracle.extras["codes"]
        return codes

    def at_degree(self, tp_size: int) -> tuple[Sequence[Trace], Sequence[Trace]]:
        """Return all ranks' traces: in float64 (none if it cannot run), in the deployed dtype."""
        order = input_order(self.inputs, tp_size)
        deployed = self.deployed_task(order, shards=True)
        if not self.subject.options.float64:
            return (), self.run(deployed, tp_size)
        exact = self.exact_task(order)
        if self._ranks.max_size >= 2 * tp_size:
            first, second = self._run_all([(exact, tp_size), (deployed, tp_size)])
            return first, second
        return self.run(exact, tp_size), self.run(deployed, tp_size)

    def accepted(self, near: int) -> list[int]:
        """Return the degrees up to twice `near` at which the subject builds, in a case's time."""
        self.start_clock()
        task, found = self.deployed_task(()), []
        for size in range(1, min(2 * near, self._ranks.max_size) + 1):
            try:
                self.run(task, size)
                found.append(size)
            except JobFailed as error:
                if error.failure.kind != "raised":  # it hung, say: enough was tried
                    break
        return found

    def exact_task(self, order: tuple[str, ...], *, alone: bool = False) -> Task:
        """Return the task in the oracle's dtype, for TP=1 or for other degrees."""
        dtype = self.oracle_dtype
        task = replace(self.task, dtype=dtype, order=order, watch=True, decode=True)
        return task if alone or self.oracle is None else replace(task, codes=self.codes)

    def deployed_task(self, order: tuple[str, ...], *, shards: bool = False) -> Task:
        """Return the task in the deployed dtype, its choices pinned to the oracle's."""
        # Simulated ranks have no torch.distributed to watch.
        watch = bool(self.pinned) or self._ranks.label != "sim"
        return replace(self.task, order=order, shards=shards, watch=watch, pinned=self.pinned)

    @property
    def noisy_task(self) -> Task:
        """The task whose narrowing casts round anew, for the noise floor."""
        keys = [key for key in self.inputs if key in ("t1", "A") or self.task.watch_all]
        return replace(
            self.exact_task(tuple(keys)),
            perturb_seed=_NOISE_SEED,
            pinned=self.pinned,
            decode=False,
        )

    @property
    def _all_lengths(self) -> tuple[str, ...]:
        return input_order(self.inputs)

    def _first(self, task: Task) -> Trace:
        """Return TP=1's trace; what is made for more rows, or one length, goes on with these."""
        try:
            return self.run(task, 1)[0]
        except JobFailed as error:
            if error.failure.kind != "raised":
                raise
            raised = error
        for fewer, note in fewer_inputs(self.inputs, self.case):
            try:
                trace = self.run(replace(task, inputs=fewer, order=input_order(fewer)), 1)[0]
            except JobFailed:
                continue
            self.inputs, self.task = fewer, replace(self.task, inputs=fewer)
            self.notes = (note,)
            return trace
        raise raised

    def start_clock(self) -> None:
        """Give the runs that follow `timeout_s` together."""
        self._deadline = time.monotonic() + self._timeout_s

    def run(self, task: Task, size: int) -> Sequence[Trace]:
        """Return every rank's trace of a task.

        Raises:
            JobFailed: a rank raised, died or hung; the failure says which and where.
        """
        return self._run_all([(task, size)])[0]

    def run_in_turn(self, tasks: Sequence[Task], size: int) -> Sequence[Sequence[Trace]]:
        """Return every rank's traces of tasks that share one build. Raises as `run` does."""
        job = Job("tpcheck.execution:execute_in_turn", tuple(tasks), size, self._left)
        replies: Sequence[Sequence[Trace]] = self._replies([job])[0]
        return replies

    def _run_all(self, tasks: Sequence[tuple[Task, int]]) -> list[Sequence[Trace]]:
        left = self._left
        return self._replies(
            [Job("tpcheck.execution:execute", task, size, left) for task, size in tasks]
        )

    @property
    def _left(self) -> float:
        return max(1.0, self._deadline - time.monotonic())

    def _replies(self, jobs: Sequence[Job]) -> list[Sequence[Any]]:
        results = self._ranks.run(jobs)
        for result in results:
            if result.failure is not None:
                raise JobFailed(result.failure)
        return [result.replies for result in results]


def unquantized(subject: Subject, task: Task) -> Task | None:
    """Return the task for the same model before quantization; None where there is none."""
    if task.spec is not None and task.spec.quantization is not None:
        return replace(task, spec=replace(task.spec, quantization=None))
    before = subject.options.unquantized
    return None if before is None else replace(task, subject=before)
