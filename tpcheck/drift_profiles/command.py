"""`tpcheck drift` and tpcheck.drift: the verdicts of `run`, and how far each of them is from TP=1.

Requirement: whoever asks how far gets the answer to "is it the same function?" first, with the same
outcomes and exit codes; a profile that could not be made costs no verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tpcheck.case_runs import CaseRuns
from tpcheck.drift_profiles.remedies import parse_remedies, remedies
from tpcheck.drift_profiles.runs import DriftRuns
from tpcheck.drift_profiles.summary import summary
from tpcheck.errors import TPCheckError
from tpcheck.groups.jobs import JobFailed, Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.groups.surroundings import one_thread
from tpcheck.investigation import Settings
from tpcheck.judging import Seen, subject_of
from tpcheck.numerics.reduction import KINDS
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.observation.wire import wires_for
from tpcheck.records import SKIPPED, Report, Verdict
from tpcheck.run_plan import DTYPES, RunPlan, make_run_plan, positive, repro_options
from tpcheck.sensitivity import with_sensitivity
from tpcheck.spec import Case
from tpcheck.subjects import make_ref, resolve
from tpcheck.workflow import Progress, judged, report_of

Json = dict[str, Any]


def drift(
    subject: str | Callable[..., Any],
    tp_sizes: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    ranks_per_gpu: int | None = None,
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    cases: int | None = None,
    max_failures: int | None = None,
    case: str | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    preset: str | None = None,
    wires: Sequence[str] = (),
    declared: str = "",
    fallback: str | Sequence[str] = (),
    width: bool = False,
    sensitivity: bool = False,
    timeout_s: float = 120.0,
    confirm: bool = True,
    reduction: str = "ring",
    progress: Progress | None = None,
) -> Report:
    """Say how far a subject drifts at every TP degree, and what its reduction explains of that.

    Each verdict is that of `tpcheck.run`; its drift check has a `profile` besides (profile.py
    says what is in it), and the report's `drift` is what they come to together.

    Args:
        subject: a name or a callable `build(tp) -> forward`, as `tpcheck.run` takes it.
        tp_sizes: degrees; by default 2, 4, 8 as far as the plan and the backend allow.
        backend: auto, sim, gloo or nccl.
        ranks_per_gpu: several NCCL ranks on one GPU.
        dtypes: deployed dtypes: bfloat16, float16, float32.
        cases: seeds seed, seed+1, ...; for a subject that takes specs, how many to generate.
        max_failures: stop after this many verdicts that are not PASS.
        case: the id of the one case to run.
        batch: rows per input, 2 by default.
        seq_len: longest input, by default the subject's own.
        seed: of the first case.
        atol: a user's tolerance against TP=1; failing it is DRIFT.
        rtol: its relative part.
        preset: a named tolerance, `seed-1e-2`.
        wires: dtypes on the wire to try besides the deployed one; by default all: float32, float16,
            bfloat16, fp8_wire, int8_wire, int6_wire, int4_wire.
        declared: how the engine says it sums, in the deployed dtype: ring, tree, wide or fp32_wire;
            by default as `reduction`. Outputs that refute it raise an alarm in the findings.
        fallback: levels to measure: head, rowwise, full, fp32_wire, fixed_tree.
        width: time each degree's forward and collectives; real ranks only.
        sensitivity: plant faults in the subject and say which of them the checks catch.
        timeout_s: seconds one case may take at one degree, and again for its profile.
        confirm: hold failures seen in simulation only against real ranks.
        reduction: how simulated ranks sum; needs backend sim.
        progress: called as (verdicts done, verdicts in all, what is next).

    Returns:
        A Report with one verdict per (case, degree, dtype), and `drift`.

    Raises:
        TPCheckError: an option, the subject or the backend is unusable; the message names it.

    Example:
        >>> import tpcheck
        >>> ways = {"dtypes": ("bfloat16",), "wires": ("float32",), "backend": "sim"}
        >>> report = tpcheck.drift("builtin:llama-tiny", (2,), **ways)
        >>> report.outcome, report.drift["rows"][0]["ratio"] < 1.5
        ('PASS', True)
    """
    ref = make_ref(subject)
    plan = make_run_plan(
        ref,
        resolve(ref),
        tp_sizes,
        backend=backend,
        ranks_per_gpu=ranks_per_gpu,
        dtypes=dtypes,
        cases=cases,
        max_failures=max_failures,
        case=case,
        batch=batch,
        seq_len=seq_len,
        seed=seed,
        settings=Settings(
            tp_sizes=(),
            tolerance=users_tolerance(atol, rtol, preset),
            timeout_s=positive("timeout", timeout_s),
            confirm=confirm,
            reduction=reduction,
        ),
        options=repro_options(backend, batch, seq_len, atol, rtol, preset),
    )
    _require_known("wire", wires, [wire for dtype in DTYPES for wire in wires_for(dtype)])
    _require_known("declared", [declared] if declared else [], KINDS)
    levels = parse_remedies(fallback, plan.backend, width=width)
    seen = Seen()
    with (
        one_thread(),
        open_ranks(plan.backend, max(plan.tp_sizes), plan.ranks_per_gpu, reduction) as ranks,
    ):
        seen.label = ranks.label
        profiler = _Profiler(plan, ranks, declared or reduction, wires)
        verdicts = tuple(profiler.profiled(judged(plan, ranks, seen, progress)))
        asked = remedies(plan, ranks, verdicts, levels, width=width)
        report = replace(report_of(plan, verdicts, seen), drift=summary(profiler.made) | asked)
        return with_sensitivity(report, plan, ranks, progress) if sensitivity else report


class _Profiler:
    """Adds to verdicts how far they are, one case after the other."""

    def __init__(self, plan: RunPlan, ranks: Ranks, declared: str, wires: Sequence[str]) -> None:
        self.made: list[tuple[int, str, str, Json]] = []
        self._plan = plan
        self._ranks = ranks
        self._declared = declared
        self._wires = wires
        self._last: tuple[tuple[str, str], DriftRuns] | None = None

    def profiled(self, verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
        """Yield each verdict, its drift check with a `profile` or the reason why there is none."""
        for verdict in verdicts:
            check = verdict.checks.get("drift")
            if check is None:
                yield verdict
                continue
            reason = _no_profile(verdict)
            facts: Json = {"profile": None, "profile_reason": reason}
            if not reason:
                facts = self._profile(verdict)
            held = replace(check, facts={**check.facts, **facts})
            yield replace(verdict, checks={**verdict.checks, "drift": held})

    def _profile(self, verdict: Verdict) -> Json:
        try:
            wrong = verdict.outcome == "WRONG"
            made = self._runs(verdict).profile(verdict.tp_size, wrong=wrong)
        except JobFailed as error:
            return {"profile": None, "profile_reason": f"a run for it failed: {error}"}
        self.made.append((verdict.tp_size, verdict.dtype, verdict.outcome, made))
        return {"profile": made}

    def _runs(self, verdict: Verdict) -> DriftRuns:
        """Return the runs of this case and dtype; TP=1's serve every degree."""
        key = (verdict.case_id, verdict.dtype)
        if self._last is None or self._last[0] != key:
            plan, settings = self._plan, self._plan.settings
            case = Case.parse(verdict.case_id)
            runs = CaseRuns(
                self._ranks,
                plan.ref,
                subject_of(plan, case),
                case,
                verdict.dtype,
                plan.tp_sizes,
                settings.timeout_s,
            )
            self._last = key, DriftRuns(runs, settings.reduction, self._declared, self._wires)
        return self._last[1]


def _no_profile(verdict: Verdict) -> str:
    check = verdict.checks["drift"]
    if check.outcome == SKIPPED:
        return check.reason
    return ""


def _require_known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(given, str):
        raise TPCheckError(f'{name}s={given!r}, but should be several: ("float32", "float16")')
    for one in given:
        if one not in known:
            choices = ", ".join(dict.fromkeys(known))
            raise TPCheckError(f"{name}={one!r}, but should be one of {choices}")
