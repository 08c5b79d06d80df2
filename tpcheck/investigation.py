"""One case in one dtype: which runs it takes to know, and the evidence they give.

Requirement: most cases need four runs (TP=1 and TP=N, in float64 and in the deployed dtype). More
are made only when a number needs an explanation: the noise floor of hard casts, routing pinned to
the reference, the drift this case's own partials explain, the module that diverges first. TP=1 runs
once for all degrees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tpcheck.checks import drift, drifts, run_checks, structural
from tpcheck.comparison import relative
from tpcheck.divergence import first_divergence
from tpcheck.evidence import Evidence, distance, noise_floor, routing_flips, with_outputs
from tpcheck.execution import Task
from tpcheck.groups.jobs import Job, JobFailed, Ranks
from tpcheck.inputs import input_order, make_inputs, more_inputs
from tpcheck.numerics.drift import ASSUMED_ERROR, expected_ratio, floored
from tpcheck.numerics.tolerance import Tolerance, structural_limit
from tpcheck.numerics.ulp import eps
from tpcheck.observation.dispatch import Choice
from tpcheck.records import FAIL, Check, FirstDivergence
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectRef
from tpcheck.trace import Trace

_NOISE_SEED = 1
_ROUNDINGS = 8
"""Repetitions that round anew: nine independent errors where there was one."""
_TIE = 1e-9
"""A choice between values closer than this (relative) is a tie that float64 rounding may break."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for every case of a run."""

    tp_sizes: tuple[int, ...]
    tolerance: Tolerance | None = None
    timeout_s: float = 120.0
    until: str = ""
    reduction: str = "ring"
    confirm: bool = True
    locate: bool = True


@dataclass(frozen=True, slots=True)
class Findings:
    """What one (case, degree, dtype) came to."""

    checks: Mapping[str, Check]
    first_divergence: FirstDivergence | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    collectives: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Investigation:
    """Runs one case of a subject in one deployed dtype, at any number of degrees."""

    def __init__(
        self,
        ranks: Ranks,
        ref: SubjectRef,
        subject: Subject,
        case: Case,
        dtype: str,
        settings: Settings,
    ) -> None:
        self._ranks = ranks
        self._subject = subject
        self._case = case
        self._dtype = dtype
        self._settings = settings
        self._inputs = make_inputs(subject, case, settings.tp_sizes)
        self._task = Task(
            subject=ref,
            seed=case.seed,
            dtype=dtype,
            weight_dtype=dtype,
            inputs=self._inputs,
            order=(),
            spec=subject.options.spec if subject.options.specs is not None else None,
        )
        self._deadline = math.inf

    def findings(self, tp_size: int) -> Findings:
        """Run what it takes at one degree and return every check.

        Raises:
            JobFailed: a rank raised, died or hung; the failure says which and where.
        """
        evidence, notes = self.evidence(tp_size)
        checks = run_checks(evidence)
        divergence, more = self._where(evidence, checks)
        counts = checks["schedule"].facts.get("per_forward", {})
        facts = evidence.deployed[0].facts
        return Findings(checks, divergence, facts, counts, (*notes, *more))

    def evidence(self, tp_size: int) -> tuple[Evidence, tuple[str, ...]]:
        """Return what `findings` judges, and notes on how it came about. Raises as it does."""
        self._start_clock()
        oracle, base = self._oracle, self._base
        self._start_clock()
        exact, deployed = self._at_degree(tp_size)
        evidence = Evidence(
            dtype=self._dtype,
            tp_size=tp_size,
            base=base,
            deployed=deployed,
            oracle=oracle,
            exact=exact,
            oracle_dtype=self._oracle_dtype or self._dtype,
            expected=self._planned_ratio(tp_size),
            expected_source=f"{self._settings.reduction} of {tp_size} equal, independent partials",
            base_error=self._base_error_without_oracle,
            tolerance=self._settings.tolerance,
            logits=self._subject.options.logits,
            **self._routing(deployed),
        )
        return self._explained(evidence)

    # TP=1, once for all degrees.

    @cached_property
    def _oracle_dtype(self) -> str:
        """float64, or the widest the subject admits to, or nothing."""
        if self._subject.options.float64:
            return "float64"
        return "" if self._dtype == "float32" else "float32"

    @cached_property
    def _oracle(self) -> Trace | None:
        if self._subject.options.float64:
            return self._run(self._exact_task(self._all_lengths), 1)[0]
        if not self._oracle_dtype:
            return None
        try:
            return self._run(replace(self._exact_task(self._all_lengths), decode=False), 1)[0]
        except JobFailed:
            self._oracle_dtype = ""  # fixed-dtype kernels: TP=1 itself is all there is
            return None

    @cached_property
    def _base(self) -> Trace:
        return self._run(self._deployed_task(self._all_lengths, shards=True), 1)[0]

    @cached_property
    def _base_error_without_oracle(self) -> float | None:
        """TP=1's response to half an ulp in its own weights, where no wider run can be had."""
        if self._oracle is not None:
            return None
        task = replace(self._deployed_task(self._all_lengths), perturb_weights=_NOISE_SEED)
        moved = self._run(task, 1)[0]
        error, magnitude, _ = distance(moved, self._base)
        return max(error, ASSUMED_ERROR * eps(self._dtype) * magnitude)

    @property
    def _all_lengths(self) -> tuple[str, ...]:
        return input_order(self._inputs)

    @property
    def _pinned(self) -> Mapping[str, Sequence[Choice]]:
        return {} if self._oracle is None else self._oracle.extras["choices"]

    # TP=N.

    def _at_degree(self, tp_size: int) -> tuple[Sequence[Trace], Sequence[Trace]]:
        order = input_order(self._inputs, tp_size)
        deployed = self._deployed_task(order, shards=True)
        if not self._subject.options.float64:
            return (), self._run(deployed, tp_size)
        exact = self._exact_task(order)
        if self._ranks.max_size >= 2 * tp_size:
            first, second = self._run_all([(exact, tp_size), (deployed, tp_size)])
            return first, second
        return self._run(exact, tp_size), self._run(deployed, tp_size)

    def _exact_task(self, order: tuple[str, ...]) -> Task:
        dtype = self._oracle_dtype
        return replace(self._task, dtype=dtype, order=order, watch=True, decode=True)

    def _deployed_task(self, order: tuple[str, ...], *, shards: bool = False) -> Task:
        # Simulated ranks have no torch.distributed to watch.
        watch = bool(self._pinned) or self._ranks.label != "sim"
        return replace(self._task, order=order, shards=shards, watch=watch, pinned=self._pinned)

    # Explanations: each is a run that is made only when a check asks for it.

    def _explained(self, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
        evidence = self._with_full_outputs(evidence)
        evidence = self._with_noise_floor(evidence)
        evidence, notes = self._with_ties_pinned(evidence)
        return self._with_expected_drift(evidence), notes

    def _with_full_outputs(self, evidence: Evidence) -> Evidence:
        """Where ranks disagree, run again with every rank's output, to say where."""
        for name, traces in (("exact", evidence.exact), ("deployed", evidence.deployed)):
            keys = traces[0].digests if traces else {}
            if all(len({t.digests.get(key) for t in traces}) == 1 for key in keys):
                continue
            if self._subject.options.logits == "rank0":
                continue
            order = input_order(self._inputs, evidence.tp_size)
            task = self._exact_task(order) if name == "exact" else self._deployed_task(order)
            again = self._run(replace(task, every_output=True), evidence.tp_size)
            merged = [
                replace(old, outputs=new.outputs) if new.digests == old.digests else old
                for old, new in zip(traces, again, strict=True)
            ]
            evidence = replace(evidence, **{name: merged})  # type: ignore[arg-type]
        return evidence

    def _with_noise_floor(self, evidence: Evidence) -> Evidence:
        """Hard casts bound what a float64 run can see: measure at TP=1, at TP=N only if needed."""
        oracle = evidence.oracle
        if oracle is None or not evidence.exact:
            return evidence
        casts = [*oracle.casts, *(cast for trace in evidence.exact for cast in trace.casts)]
        if not casts:
            return evidence
        moved = []
        if oracle.casts:
            moved.append((self._noisy_alone, oracle))
            evidence = replace(evidence, floor=noise_floor(casts, moved))
            if structural(evidence).outcome != FAIL:
                return evidence
        still = evidence.exact[0]
        if self._pinned:  # else choices that a fault flips would raise the limit it is held to
            still = self._run(replace(self._noisy_task, perturb_seed=None), evidence.tp_size)[0]
        moved.append((self._run(self._noisy_task, evidence.tp_size)[0], still))
        return replace(evidence, floor=noise_floor(casts, moved))

    @cached_property
    def _noisy_alone(self) -> Trace:
        return self._run(self._noisy_task, 1)[0]

    @property
    def _noisy_task(self) -> Task:
        keys = [key for key in self._inputs if key in ("t1", "A")]
        return replace(
            self._exact_task(tuple(keys)),
            perturb_seed=_NOISE_SEED,
            pinned=self._pinned,
            decode=False,
        )

    def _with_ties_pinned(self, evidence: Evidence) -> tuple[Evidence, tuple[str, ...]]:
        if evidence.oracle is None or not evidence.exact or not self._pinned:
            return evidence, ()
        if structural(evidence).outcome != FAIL:
            return evidence, ()
        flips, margin = routing_flips(evidence.exact[0].extras["choices"], self._pinned)
        if not flips or margin > max(_TIE, structural_limit(evidence.floor.relative_rms)):
            return evidence, ()
        order = input_order(self._inputs, evidence.tp_size)
        task = replace(self._exact_task(order), pinned=self._pinned)
        note = f"routing: {flips} ties (margin {margin:.2g}) were pinned to the reference"
        return replace(evidence, exact=self._run(task, evidence.tp_size)), (note,)

    def _with_expected_drift(self, evidence: Evidence) -> Evidence:
        proven = structural(evidence).outcome == FAIL  # then no alarm rests on drift
        again = iter(()) if proven else self._measured_again(evidence)
        while drifts(drift(evidence)) and (more := next(again, None)) is not None:
            evidence = more
        if not drifts(drift(evidence)) or not evidence.exact:
            return evidence
        coarse = {
            cast.target
            for trace in evidence.exact
            for cast in trace.casts
            if eps(cast.target) > eps(self._dtype)
        }
        if coarse:
            return self._with_coarse_base(evidence, coarse)
        order = tuple(dict.fromkeys(input_order(self._inputs, evidence.tp_size)))
        task = replace(
            self._exact_task(order),
            noise_dtype=self._dtype,
            noise_kind=self._settings.reduction,
            pinned=self._pinned,
            decode=False,
            watch=False,
        )
        noisy = self._run(task, evidence.tp_size)[0]
        still = evidence.exact[0]
        if self._pinned:  # else choices that a fault flips would count as rounding
            still = self._run(replace(task, noise_dtype=""), evidence.tp_size)[0]
        response, _, _ = distance(noisy, still)
        oracle = evidence.oracle
        assert oracle is not None
        error, magnitude, _ = distance(evidence.base, oracle)
        at_1 = floored(error, magnitude, eps(self._dtype))
        if not at_1:
            return evidence
        expected = math.sqrt(1 + (response / at_1) ** 2)
        if expected <= evidence.expected:
            return evidence
        source = "the rounding of this case's own partials, injected into float64"
        return replace(evidence, expected=expected, expected_source=source)

    def _measured_again(self, evidence: Evidence) -> Iterator[Evidence]:
        """Yield the evidence with more and more runs beside it, before an alarm rests on a few.

        Other inputs first. Where one token carries the error (a norm of few channels), as many of
        them as one likes are still that one token: then weights that are an ulp apart, because
        they round anew.
        """
        inputs = more_inputs(self._subject, self._case)
        task = replace(self._task, inputs=inputs, order=tuple(inputs))
        evidence = self._with_runs(evidence, task, "")
        yield evidence
        order = tuple(dict.fromkeys(input_order(self._inputs, evidence.tp_size)))
        for seed in range(1, _ROUNDINGS + 1):
            task = replace(self._task, order=order, other_weights=seed)
            evidence = self._with_runs(evidence, task, f" with other weights {seed}")
        yield evidence

    def _with_runs(self, evidence: Evidence, task: Task, suffix: str) -> Evidence:
        if evidence.oracle is not None:
            wide = self._run(replace(task, dtype=self._oracle_dtype, watch=True), 1)[0]
            pinned = wide.extras["choices"]
            task = replace(task, watch=bool(pinned), pinned=pinned)
            evidence = replace(evidence, oracle=with_outputs(evidence.oracle, wide, suffix))
        base, deployed = self._run(task, 1)[0], self._run(task, evidence.tp_size)[0]
        first, *others = evidence.deployed
        return replace(
            evidence,
            base=with_outputs(evidence.base, base, suffix),
            deployed=[with_outputs(first, deployed, suffix), *others],
        )

    def _with_coarse_base(self, evidence: Evidence, coarse: set[str]) -> Evidence:
        """Where TP=1 rounds coarser than the deployed dtype itself, that is its own error.

        The oracle makes the same cast, so both agree and e1 would be 0. What only TP=N rounds
        coarser explains nothing.
        """
        oracle = evidence.oracle
        if oracle is None or not coarse <= {cast.target for cast in oracle.casts}:
            return evidence
        error, magnitude, _ = distance(evidence.base, oracle)
        moved, size, _ = distance(self._noisy_alone, oracle)
        return replace(evidence, base_error=max(error, relative(moved, size) * magnitude))

    def _planned_ratio(self, tp_size: int) -> float:
        ratio = expected_ratio(tp_size, self._settings.reduction)
        # Without an oracle the reference carries TP=1's own error as well.
        return ratio if self._oracle is not None else math.sqrt(1 + ratio**2)

    def _routing(self, deployed: Sequence[Trace]) -> dict[str, Any]:
        if not self._pinned:
            return {}
        flips, margin = routing_flips(deployed[0].extras["choices"], self._pinned)
        pinned = all(trace.extras["unpinned"] == 0 for trace in deployed)
        return {
            "routing_flips": flips,
            "routing_margin": margin if flips else None,
            "routing_pinned": pinned,
        }

    def _where(
        self, evidence: Evidence, checks: Mapping[str, Check]
    ) -> tuple[FirstDivergence | None, tuple[str, ...]]:
        if not self._settings.locate:
            return None, ()
        until = self._settings.until
        return first_divergence(
            replace(self._task, until=until), self._run, evidence, checks, self._oracle_dtype
        )

    # Jobs.

    def _start_clock(self) -> None:
        self._deadline = time.monotonic() + self._settings.timeout_s

    def _run(self, task: Task, size: int) -> Sequence[Trace]:
        return self._run_all([(task, size)])[0]

    def _run_all(self, tasks: Sequence[tuple[Task, int]]) -> list[Sequence[Trace]]:
        left = max(1.0, self._deadline - time.monotonic())
        jobs = [Job("tpcheck.execution:execute", task, size, left) for task, size in tasks]
        results = self._ranks.run(jobs)
        for result in results:
            if result.failure is not None:
                raise JobFailed(result.failure)
        return [result.replies for result in results]
