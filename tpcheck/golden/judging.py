"""Hold a degree to a golden record: found or missing, same bits, same function, how far off.

Requirement: TP=1 has the bits that were recorded where the environment is the same, and elsewhere
the same function within what rounding explains; every degree is the same function as the recorded
oracle, and drifts from it no further than its reduction explains. A record that is missing, of
other weights or not to be trusted is said so by name and is never a PASS: `record` fails, and with
it the verdict is INCONCLUSIVE. Today's TP=1 is held to the record, not the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from tpcheck.case_runs import CaseRuns
from tpcheck.checks import allclose, drift, run_checks, structural
from tpcheck.conduct import rank_agreement, repeatability, schedule, tiling
from tpcheck.evidence import Evidence, NoiseFloor
from tpcheck.execution import AGAIN
from tpcheck.golden.finding import Found
from tpcheck.golden.making import (
    BY_RANKS,
    BY_STREAMING,
    environment_differences,
    evidence_alone,
)
from tpcheck.golden.records import Golden, Logits
from tpcheck.golden.sketches import sketch, taken
from tpcheck.golden.tensors import Kept, argmax
from tpcheck.investigation import Findings, Investigation
from tpcheck.numerics.drift import expected_ratio, ratio_limit
from tpcheck.records import FAIL, PASS, SKIPPED, Check
from tpcheck.trace import Trace

Outputs = Mapping[str, torch.Tensor]


class AgainstRecord:
    """The findings of a case held to its record; see judging.Investigating."""

    def __init__(
        self, investigation: Investigation, find: Callable[[], Found], *, beside_tp1: bool = True
    ) -> None:
        """Hold to what `find` finds; `beside_tp1`: TP=1 is among the degrees that are verified."""
        self._beside_tp1 = beside_tp1
        self._investigation = investigation
        self._find = find
        self._found: Found | None = None

    def findings(self, tp_size: int) -> Findings:
        """Return every check at one degree, the record's among them.

        Raises:
            JobFailed: a rank raised, died or hung; the failure says which and where.
        """
        runs = self._investigation.runs
        runs.start_clock()
        if self._found is None:
            self._found = self._find()
        golden, kept = self._found.golden, self._found.kept
        if golden is None or kept is None:
            missing = Check(FAIL, self._found.problem)
            return Findings({"plan": Check(PASS), "record": missing})
        if golden.made_by == BY_STREAMING and not self._beside_tp1:
            return without_tp1(runs, golden, kept, tp_size)
        notes: tuple[str, ...] = ()
        if tp_size == 1:
            evidence = evidence_alone(runs)
        else:
            evidence, notes = self._investigation.evidence(tp_size)
        checks = run_checks(evidence) | checks_against(evidence, golden, kept)
        counts = checks["schedule"].facts.get("per_forward", {})
        return Findings(checks, None, evidence.deployed[0].facts, counts, notes)


def without_tp1(runs: CaseRuns, golden: Golden, kept: Mapping[str, Kept], tp_size: int) -> Findings:
    """Return the findings of a degree whose TP=1 fits no machine: the record alone stands for it.

    Raises:
        JobFailed: a rank raised, died or hung.
    """
    nothing = Trace(
        0, {}, {}, {}, extras={"choices": {}, "codes": (), "sent": {}, "consumed": {}, "shards": {}}
    )
    vars(runs)["oracle"] = nothing  # so that no run asks for one
    exact, deployed = runs.at_degree(tp_size)
    evidence = Evidence(
        dtype=runs.dtype,
        tp_size=tp_size,
        base=nothing,
        deployed=deployed,
        oracle=nothing,
        exact=exact,
        expected=expected_ratio(tp_size),
        expected_source=f"ring of {tp_size} equal, independent partials",
        logits=runs.subject.options.logits,
    )
    conduct = (rank_agreement, repeatability, schedule, tiling)
    checks = {"plan": Check(PASS)} | {check.__name__: check(evidence) for check in conduct}
    checks["record"] = Check(PASS, "", {"file": golden.file, "address": golden.address})
    problem = _other_shapes(evidence, golden)
    if problem:
        checks["structural"] = Check(FAIL, problem)
        return Findings(checks, None, deployed[0].facts)
    held = against(evidence, golden, kept)
    same = _explained(structural(held), golden)
    if same.outcome == FAIL and any(trace.casts for trace in exact):
        why = "the subject casts, and how far that moves it is measured at TP=1: add 1 to --tp"
        same = Check(SKIPPED, why, same.facts)
    checks |= {"structural": same, "drift": _of_all_errors(drift(held), held, golden)}
    counts = checks["schedule"].facts.get("per_forward", {})
    return Findings(
        checks, None, deployed[0].facts, counts, ("TP=1 was not run: it is as recorded",)
    )


def checks_against(
    evidence: Evidence, golden: Golden, kept: Mapping[str, Kept]
) -> dict[str, Check]:
    """Return the checks that a record decides; they take the place of those of the run alone."""
    deployed = evidence.deployed[0]
    flips = sum(
        int((argmax(deployed.outputs[key]) != one.argmax).sum())
        for key, one in kept.items()
        if key in deployed.outputs and _fits(deployed.outputs[key], golden.logits[key])
    )
    facts = {"file": golden.file, "address": golden.address, "argmax_flips": flips}
    checks = {"record": Check(PASS, "", facts)}
    if evidence.tp_size == 1:
        checks["bits"] = bits(evidence.base, golden)
    problem = _other_shapes(evidence, golden)
    if problem:
        return checks | {"structural": Check(FAIL, problem)}
    held = against(evidence, golden, kept)
    by_itself, by_record = structural(evidence), structural(held)
    checks["structural"] = by_itself if by_itself.outcome == FAIL else _explained(by_record, golden)
    checks["drift"] = _drift(evidence, held, golden)
    needs_all = "a small record holds no single logit at every position: record with --full"
    checks["allclose"] = allclose(held) if golden.full else Check(SKIPPED, needs_all)
    return checks


def bits(base: Trace, golden: Golden) -> Check:
    """TP=1 in the deployed dtype has the recorded bits, where nothing around it has changed."""
    for key, one in golden.logits.items():
        dtype = str(base.outputs[key].dtype).removeprefix("torch.") if key in base.outputs else ""
        if dtype and dtype != one.dtype:
            return Check(FAIL, f"{key}: dtype={dtype}, but should be {one.dtype} as recorded")
    other = [key for key, one in golden.logits.items() if base.digests.get(key) != one.deployed]
    if not other:
        return Check(PASS, "", {"inputs": len(golden.logits)})
    if not golden.repeats:
        return Check(SKIPPED, "TP=1 did not repeat its own bits when it was recorded")
    differences = environment_differences(golden, base.facts, BY_RANKS)
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        return Check(
            SKIPPED, f"another environment rounds otherwise: {'; '.join(differences[:3])}{more}"
        )
    return Check(
        FAIL,
        f"{len(other)} of {len(golden.logits)} inputs, {other[0]} first, have other bits than"
        f" {golden.file}, in the same environment: the code is another one",
        {"inputs": len(golden.logits), "other": len(other)},
    )


def against(evidence: Evidence, golden: Golden, kept: Mapping[str, Kept]) -> Evidence:
    """Return the evidence with the recorded oracle and TP=1 in the place of today's.

    Of a small record everything is seen through its sketches. Inputs that a record does not hold
    (more of them are run before an alarm rests on few) keep today's TP=1. Of ranks the first is
    held to the record; that the others agree with it is another check's.
    """
    view = _View(golden, kept)
    oracle = None
    if golden.oracle_dtype:
        today = {} if evidence.oracle is None else view.seen(evidence.oracle.outputs, exact=True)
        outputs = {**today, **view.recorded(exact=True)}
        oracle = replace(evidence.oracle or evidence.base, outputs=outputs)
    base = view.seen(evidence.base.outputs) | view.recorded()
    # runs in another dtype than the recorded oracle's are not the same function to the last bit
    exact = evidence.exact[:1] if evidence.oracle_dtype == golden.oracle_dtype else ()
    if exact and evidence.elsewhere is not None and evidence.oracle is not None:
        exact = [evidence.oracle]  # with which TP=N agreed there: so this is what is held
    floor = evidence.floor
    if evidence.tp_size == 1:  # what today's code casts must not widen what it is held to
        floor = NoiseFloor(
            golden.floor.relative_rms, tier=golden.floor.tier, source=golden.floor.source
        )
    return replace(
        evidence,
        oracle=oracle,
        oracle_dtype=golden.oracle_dtype or evidence.dtype,
        base=replace(evidence.base, outputs=base),
        exact=[replace(t, outputs=view.seen(t.outputs, exact=True)) for t in exact],
        deployed=[replace(t, outputs=view.seen(t.outputs)) for t in evidence.deployed[:1]],
        base_error=evidence.base_error if golden.oracle_dtype else golden.base_error,
        floor=floor,
        elsewhere=None,
    )


class _View:
    """Outputs as a record keeps them."""

    def __init__(self, golden: Golden, kept: Mapping[str, Kept]) -> None:
        self._full = golden.full
        self._kept = kept

    def recorded(self, *, exact: bool = False) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        for key, one in self._kept.items():
            whole = one.whole_oracle if exact else one.whole_deployed
            made = one.oracle if exact else one.deployed
            assert made is not None
            if self._full:
                assert whole is not None
                outputs[key] = whole
                continue
            outputs[key] = made.sums
            if exact and one.top_oracle is not None:
                outputs |= {f"{key} rms": made.rms, f"{key} top": one.top_oracle}
        return outputs

    def seen(self, outputs: Outputs, *, exact: bool = False) -> dict[str, torch.Tensor]:
        return {
            name: value
            for key, logits in outputs.items()
            if key not in (AGAIN, "decode")
            for name, value in self._seen(key, logits, exact=exact).items()
        }

    def _seen(self, key: str, logits: torch.Tensor, *, exact: bool) -> Outputs:
        if self._full:
            return {key: torch.view_as_real(logits) if logits.is_complex() else logits}
        made, one = sketch(logits), self._kept.get(key)
        if one is None:
            return {key: made.sums}
        recorded = one.oracle if exact else one.deployed
        assert recorded is not None
        # what is not finite at other places shows as such to the checks
        strange = (made.strange != recorded.strange).any(1, keepdim=True)
        outputs = {key: torch.where(strange, math.nan, made.sums)}
        if exact:
            top = taken(logits, one.positions, one.top)
            outputs |= {f"{key} rms": made.rms, f"{key} top": top}
        return outputs


def _explained(check: Check, golden: Golden) -> Check:
    if golden.full or check.outcome != FAIL or "worst at" not in check.reason:
        return check
    return replace(check, reason=f"{check.reason} (position, and which sum of its logits or top)")


def _drift(evidence: Evidence, held: Evidence, golden: Golden) -> Check:
    """The drift from the recorded oracle, as a ratio to TP=1's recorded error."""
    alone = drift(evidence)
    if alone.outcome == SKIPPED:
        return alone
    return _of_all_errors(drift(held), held, golden)


def _of_all_errors(check: Check, held: Evidence, golden: Golden) -> Check:
    ratio = check.facts.get("ratio")
    if check.outcome != FAIL or ratio is None or check.facts.get("overflow"):
        return check
    # sketches spread the error of a massive element: whole logits say on how many it rests
    limit = ratio_limit(held.expected, golden.error_count)
    if limit < ratio:
        return check
    return Check(PASS, "", {**check.facts, "limit": limit})


def _other_shapes(evidence: Evidence, golden: Golden) -> str:
    alone = [trace for trace in (evidence.oracle, evidence.base) if trace is not None]
    for trace in (*evidence.exact[:1], *evidence.deployed[:1], *alone):
        for key, one in golden.logits.items():
            logits = trace.outputs.get(key)
            if logits is None:
                if evidence.tp_size == 1:
                    return f"{key}: there is no output, but there is one in {golden.file}"
            elif not _fits(logits, one):
                wanted = f"{list(one.shape)} as recorded"
                return f"{key}: shape={list(logits.shape)}, but should be {wanted}"
    return ""


def _fits(logits: torch.Tensor, one: Logits) -> bool:
    return tuple(logits.shape) == one.shape
