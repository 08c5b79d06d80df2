"""The runs behind a drift profile: what is asked of the ranks, for one case in one deployed dtype.

Requirement: everything a profile holds against each other ran on the same inputs, the same weights
and one build per degree; TP=1 runs once for all degrees. A wire that a subject's sums cannot be
carried in is said, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from tpcheck.case_runs import CaseRuns
from tpcheck.drift_profiles.layers import (
    depth,
    observed_sums,
    row_parallel,
    split_inputs,
    summed_elsewhere,
)
from tpcheck.drift_profiles.profile import Carried, DriftEvidence, profile
from tpcheck.drift_profiles.reductions import layers_json
from tpcheck.evidence import distance, routing_flips
from tpcheck.execution import Task
from tpcheck.groups.base import Interceptor
from tpcheck.groups.jobs import JobFailed
from tpcheck.inputs import more_inputs
from tpcheck.numerics.low_precision import LOW_PRECISION
from tpcheck.numerics.ulp import eps
from tpcheck.observation.injection import reduction_noise
from tpcheck.observation.wire import Wire, wires_for
from tpcheck.trace import Trace

Json = dict[str, Any]

MORE_INPUTS = 2
"""Inputs besides A and B: at batch 2 and 16 tokens, 128 tokens tell a ratio to about 4 %."""

NOT_ROUNDING = "TP=N is not the same function, so rounding does not explain how far it is"

_NOISE_SEED = 11


class DriftRuns:
    """Profiles one case of a subject in one deployed dtype, at any number of degrees."""

    def __init__(self, runs: CaseRuns, kind: str, declared: str, wires: Sequence[str] = ()) -> None:
        """Take how ranks sum (`kind`), how the engine says they do, and which wires to try."""
        self._runs = runs
        self._kind = kind
        self._declared = declared
        self._wanted = wires
        self._own_calls = False  # looking for them costs Python for every op
        more = dict(list(more_inputs(runs.subject, runs.case).items())[:MORE_INPUTS])
        self._inputs = {"A": runs.inputs["A"], "B": runs.inputs["B"], **more}

    def profile(self, tp_size: int, *, wrong: bool = False) -> Json:
        """Return the profile at one degree: profile.py's keys, `depth`, `routing` and `rows`.

        Where TP=N was found to be another function (`wrong`), only how far it is: no other wire, no
        prediction and no reduction, because rounding explains nothing of it.

        `rows` is reductions.layers_json, None with a reason where no row-parallel layer can
        be seen; `routing`: `flips` and `margin` of top-k choices against the oracle's, None where
        the subject makes none.

        Raises:
            JobFailed: a rank raised, died or hung; the failure says which and where.
        """
        self._runs.start_clock()
        oracle, base = self._oracle, self._base
        self._runs.start_clock()
        native = self._native(tp_size)
        first = native[0]
        carried = [self._carried(self._own_wire, native, deployed=True)]
        asked = {} if wrong else self._without_quantizers(split_inputs(base, native))
        not_valid = NOT_ROUNDING
        if not wrong:
            carried += self._other_wires(native, asked, tp_size)
            not_valid, carried = self._with_responses(carried, native, tp_size)
        evidence = DriftEvidence(
            dtype=self._runs.dtype,
            tp_size=tp_size,
            base=base,
            carried=carried,
            oracle=oracle,
            oracle_dtype=self._runs.oracle_dtype,
            kind=self._kind,
            not_valid=not_valid,
            vocab_size=self._vocab_size,
            ids=self._ids if self._vocab_size else {},
        )
        found = profile(evidence)
        found |= {"depth": None} if oracle is None else {"depth": self._depth(first, oracle)}
        rows = {"rows": None, "rows_reason": NOT_ROUNDING} if wrong else self._rows(native, asked)
        return found | {"routing": self._routing(native), **rows}

    def _native(self, tp_size: int) -> list[Trace]:
        """Return every rank's trace as deployed; sums of the subject's own are seen, if any."""
        native = self._in_turn([self._wired("", trace="A")], tp_size)
        if native[0].extras["own_calls"] and not self._own_calls:
            self._own_calls = True
            native = self._in_turn([self._wired("", trace="A")], tp_size)
        return native

    @cached_property
    def _oracle(self) -> Trace | None:
        """TP=1 in float64, or in the widest dtype that the subject has."""
        runs = self._runs
        if not runs.oracle_dtype:
            return None
        task = replace(runs.exact_task(self._order, alone=True), inputs=self._inputs, trace="A")
        try:
            return runs.run(task, 1)[0]
        except JobFailed:
            if runs.subject.options.float64:
                raise
            return None  # fixed-dtype kernels

    @cached_property
    def _base(self) -> Trace:
        """TP=1 in the deployed dtype."""
        return self._runs.run(replace(self._deployed, trace="A"), 1)[0]

    @property
    def _deployed(self) -> Task:
        pinned = self._pinned
        return replace(
            self._runs.task,
            inputs=self._inputs,
            order=self._order,
            pinned=pinned,
            watch=bool(pinned),
            own_calls=self._own_calls,
            decode=not pinned,  # the choices of a whole forward are not those of its steps
        )

    @property
    def _order(self) -> tuple[str, ...]:
        return tuple(self._inputs)

    @property
    def _pinned(self) -> Any:
        return {} if self._oracle is None else self._oracle.extras["choices"]

    @property
    def _own_wire(self) -> str:
        return self._kind if self._kind in LOW_PRECISION else self._runs.dtype

    @property
    def _vocab_size(self) -> int:
        options = self._runs.subject.options
        return options.vocab_size if options.inputs is None else 0

    @property
    def _ids(self) -> dict[str, Tensor]:
        return {key: arguments[0] for key, arguments in self._inputs.items()}

    def _wired(self, wire: str, *, trace: str = "") -> Task:
        task = replace(self._deployed, intercept=partial(Wire, wire), trace=trace)
        if wire:
            return replace(task, decode=False)  # a forward per token: for what is deployed only
        return replace(task, watch=True)  # torch.distributed calls are seen once

    def _in_turn(self, tasks: Sequence[Task], tp_size: int) -> list[Trace]:
        """Return every rank's trace of the one task."""
        return [replies[0] for replies in self._runs.run_in_turn(tasks, tp_size)]

    def _other_wires(
        self, native: Sequence[Trace], asked: Iterable[str], tp_size: int
    ) -> list[Carried]:
        dtype = self._runs.dtype
        wires = [wire for wire in wires_for(dtype) if wire != self._own_wire]
        if self._wanted:
            wires = [wire for wire in wires if wire in self._wanted]
        reason = _cannot_be_carried(native, asked)
        if reason or not wires:
            return [Carried(wire, reason=reason) for wire in wires]
        tasks = [self._wired(wire) for wire in wires]
        replies = self._runs.run_in_turn(tasks, tp_size)
        return [
            self._carried(wire, [reply[i] for reply in replies]) for i, wire in enumerate(wires)
        ]

    def _carried(self, wire: str, traces: Sequence[Trace], *, deployed: bool = False) -> Carried:
        seen = [trace.extras["seen"] for trace in traces]
        return Carried(wire, deployed, traces[0], seen)

    def _with_responses(
        self, carried: list[Carried], native: Sequence[Trace], tp_size: int
    ) -> tuple[str, list[Carried]]:
        """Inject what each wire must round into TP=N in float64; return why that cannot hold."""
        runs, oracle = self._runs, self._oracle
        if oracle is None or runs.oracle_dtype != "float64":
            return "there is no float64 run", carried
        if unseen := _unseen(native):
            return unseen, carried
        if any(trace.extras["unpinned"] for trace in native):
            return "routing flips, and could not be pinned to the reference", carried
        asked = [one for one in carried if one.trace is not None]
        tasks = [self._exact(watch=True)]
        tasks += [self._exact(intercept=self._noise(one)) for one in asked]
        still, *noisy = runs.run_in_turn(tasks, tp_size)[0]
        coarse = [
            cast
            for trace in (oracle, still)
            for cast in trace.casts
            if eps(cast.target) > eps(runs.dtype)
        ]
        if coarse:
            where = f" in {coarse[0].fqn}" if coarse[0].fqn else ""
            return f"the subject casts to {coarse[0].target} itself{where}", carried
        responses = {
            one.reduction: distance(moved, still)[0]
            for one, moved in zip(asked, noisy, strict=True)
        }
        return "", [replace(one, response=responses.get(one.reduction)) for one in carried]

    def _exact(
        self, *, watch: bool = False, intercept: Callable[[], Interceptor] | None = None
    ) -> Task:
        assert self._oracle is not None
        return replace(
            self._runs.exact_task(self._order, alone=True),
            inputs=self._inputs,
            codes=self._oracle.extras["codes"],
            pinned=self._pinned,
            watch=watch,
            decode=False,
            own_calls=self._own_calls,
            intercept=intercept or Wire,
        )

    def _noise(self, one: Carried) -> Callable[[], Interceptor]:
        dtype, kind = self._runs.dtype, self._kind
        if one.reduction in LOW_PRECISION:
            return partial(reduction_noise, dtype, one.reduction, _NOISE_SEED)
        wire = "" if one.deployed else one.reduction
        return partial(reduction_noise, dtype, kind, _NOISE_SEED, wire)

    def _routing(self, native: Sequence[Trace]) -> Json | None:
        if not self._pinned:
            return None
        flips, margin = routing_flips(native[0].extras["choices"], self._pinned)
        pinned = all(trace.extras["unpinned"] == 0 for trace in native)
        return {"flips": flips, "margin": margin if flips else None, "pinned": pinned}

    def _without_quantizers(self, asked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out layers that round their input to codes: another dtype picks other codes."""
        codes = () if self._oracle is None else self._oracle.extras["codes"]
        rounding = {fqn for fqn, _, _ in codes}
        return {fqn: x for fqn, x in asked.items() if fqn not in rounding}

    def _depth(self, first: Trace, oracle: Trace) -> Json:
        return depth(self._base, first, oracle, self._runs.dtype)

    def _rows(self, native: Sequence[Trace], asked: Mapping[str, Tensor]) -> Json:
        if not asked or not self._runs.subject.options.float64:
            return self._sums(native)
        task = replace(
            self._runs.exact_task((), alone=True),
            inputs=self._inputs,
            decode=False,
            watch=False,
            trace="A",
            replay=asked,
        )
        try:
            answers = self._runs.run(task, 1)[0].extras["replayed"]
        except JobFailed as error:
            return {"rows": None, "rows_reason": f"a layer does not run alone: {error}"}
        layers, left_out = row_parallel(answers, self._base, native, self._runs.dtype)
        if not layers:
            fqn, reason = next(
                iter(left_out.items()), ("row-parallel layers", "none gave an output")
            )
            return {"rows": None, "rows_reason": f"{fqn}: {reason}"}
        found = layers_json(layers, self._declared, self._runs.dtype)
        return {"rows": found | {"left_out": left_out}}

    def _sums(self, native: Sequence[Trace]) -> Json:
        """Return what the sums themselves show where no exact terms of layers can be had."""
        sums = observed_sums(native, self._runs.dtype)
        if not sums:
            return {"rows": None, "rows_reason": "no sum of two terms or more was seen in full"}
        found = layers_json(sums, self._declared, self._runs.dtype, terms="sent")
        return {"rows": found | {"left_out": {}}}


def _cannot_be_carried(native: Sequence[Trace], rows: Iterable[str]) -> str:
    """Return why a subject's sums cannot be carried in another dtype; "" where they can.

    Args:
        rows: FQNs of its row-parallel layers, as far as they are known.
    """
    if unseen := _unseen(native):
        return unseen
    if not native[0].extras["seen"].sums:
        return "no sum over ranks was seen"
    other = summed_elsewhere(rows, native)
    return f"{other} sums its terms without a reduction over ranks" if other else ""


def _unseen(native: Sequence[Trace]) -> str:
    """Say which reductions of the subject's own could not be looked into; "" if none."""
    names = list(dict.fromkeys(name for trace in native for name in trace.extras["missed"]))
    if not names:
        return ""
    return f"the subject calls {', '.join(names)} of torch.distributed, whose terms are not seen"
