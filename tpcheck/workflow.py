"""Every loop over cases, degrees and dtypes: the Python API behind the command line.

Requirement: one pass through the cases, each judged at every degree and dtype, on warm ranks; a
case that fails costs only itself; and the report says what carried the run and whether that is the
path a deployment would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck import environment
from tpcheck.errors import BackendError, IllegalDegreeError, PlanError, SubjectError
from tpcheck.faults import FAULTS
from tpcheck.groups.jobs import Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.investigation import Findings, Investigation, JobFailed, Settings
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.records import CHECK_NAMES, FAIL, Path, Report, Verdict
from tpcheck.run_plan import (
    DEFAULT_TP_SIZES,
    RunPlan,
    make_run_plan,
    positive,
    repro_line,
    repro_options,
)
from tpcheck.shard_plan import make_shard_plan
from tpcheck.spec import Case, ModelSpec
from tpcheck.strategies import draw_spec
from tpcheck.subjects import Subject, make_ref, resolve, with_spec
from tpcheck.verdict import accepted_illegal, judge, judge_failure, refused, refused_as_planned

CONFIRM_UP_TO = 16
"""Largest degree whose simulated failure is confirmed on real ranks: more processes than that
cost minutes on a laptop."""

Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class _Seen:
    """What runs left behind besides verdicts."""

    facts: dict[str, Any] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    label: str = ""


def run(
    subject: str | Callable[..., Any],
    tp_sizes: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    ranks_per_gpu: int | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    cases: int = 1,
    max_failures: int | None = None,
    case: str | None = None,
    until: str | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    preset: str | None = None,
    timeout_s: float = 120.0,
    confirm: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Say whether a subject is the same function at every TP degree.

    Args:
        subject: a name (`package.module:attr`, `path/file.py:attr`, `builtin:NAME`, `hf:DIR`,
            `ref:DIR`) or a callable `build(tp) -> forward`.
        tp_sizes: degrees to prove against TP=1; by default 2, 4, 8 as far as the plan and the
            backend allow.
        backend: auto, sim, gloo or nccl.
        ranks_per_gpu: several NCCL ranks on one GPU; the result is labelled nccl-loopback.
        dtypes: deployed dtypes: bfloat16, float16, float32.
        cases: how many cases (seeds seed, seed+1, ...) to try.
        max_failures: stop after this many verdicts that are not PASS.
        case: the id of the one case to run, as a report prints it.
        until: FQN of the traced module after which localization stops.
        batch: rows per input, 2 by default.
        seq_len: longest input, by default the subject's own.
        seed: of the first case.
        atol: a user's tolerance against TP=1; failing it is DRIFT.
        rtol: its relative part.
        preset: a named tolerance, `seed-1e-2`.
        timeout_s: seconds one case may take at one degree.
        confirm: hold failures seen in simulation only against real ranks.
        progress: called as (verdicts done, verdicts in all, what is next).

    Returns:
        A Report with one verdict per (case, degree, dtype).

    Raises:
        TPCheckError: an option, the subject or the backend is unusable; the message names it.

    Example:
        >>> import tpcheck
        >>> tpcheck.run("builtin:llama-tiny", tp_sizes=(2,), backend="sim").outcome
        'PASS'
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
            until=until or "",
            confirm=confirm,
        ),
        options=repro_options(backend, batch, seq_len, atol, rtol, preset),
    )
    seen = _Seen()
    with open_ranks(plan.backend, max(plan.tp_sizes), plan.ranks_per_gpu) as ranks:
        seen.label = ranks.label
        verdicts = tuple(_verdicts(plan, ranks, seen, progress))
    return _report(plan, verdicts, seen)


def _verdicts(
    plan: RunPlan, ranks: Ranks, seen: _Seen, progress: Progress | None
) -> Iterator[Verdict]:
    total = len(plan.cases) * len(plan.dtypes) * len(plan.tp_sizes)
    done = failures = 0
    for case in plan.cases:
        subject, spec = _drawn(plan.subject, case)
        for dtype in plan.dtypes:
            investigation = Investigation(ranks, plan.ref, subject, case, dtype, plan.settings)
            for tp_size in plan.tp_sizes:
                if progress is not None:
                    progress(done, total, f"{case.id} tp={tp_size} {dtype}")
                verdict = _verdict(plan, investigation, subject, spec, case, tp_size, dtype, seen)
                if _needs_confirmation(plan, ranks, verdict):
                    verdict = _confirmed(plan, subject, case, tp_size, dtype, verdict)
                yield verdict
                done += 1
                failures += verdict.outcome != "PASS"
                if plan.max_failures is not None and failures >= plan.max_failures:
                    return
    if progress is not None:
        progress(done, total, "done")


def _drawn(subject: Subject, case: Case) -> tuple[Subject, ModelSpec | None]:
    """Return the subject with the spec this case draws, for one that takes specs."""
    if subject.options.specs is None:
        return subject, None
    spec = draw_spec(subject.options.specs, case.seed)
    return with_spec(subject, spec), spec


def _verdict(
    plan: RunPlan,
    investigation: Investigation,
    subject: Subject,
    drawn: ModelSpec | None,
    case: Case,
    tp_size: int,
    dtype: str,
    seen: _Seen,
) -> Verdict:
    repro = repro_line(plan, case, tp_size, dtype)
    illegal = _refusal(subject, tp_size)
    if illegal is not None and drawn is None:
        return refused(case, tp_size, dtype, str(illegal), repro=repro)
    try:
        found = investigation.findings(tp_size)
    except JobFailed as error:
        failure = error.failure
        _raise_if_the_users(failure.exception)
        if illegal is not None and isinstance(failure.exception, IllegalDegreeError):
            return refused_as_planned(case, tp_size, dtype, str(illegal), repro=repro)
        return judge_failure(case, tp_size, dtype, failure, repro=repro)
    if illegal is not None:
        return accepted_illegal(case, tp_size, dtype, str(illegal), repro=repro)
    _remember(seen, found)
    return judge(
        case,
        tp_size,
        dtype,
        found.checks,
        repro=repro,
        first_divergence=found.first_divergence,
        notes=found.notes,
    )


def _refusal(subject: Subject, tp_size: int) -> IllegalDegreeError | None:
    if subject.options.spec is None:
        return None
    try:
        make_shard_plan(subject.options.spec, tp_size)
    except IllegalDegreeError as error:
        return error
    return None


def _raise_if_the_users(error: BaseException | None) -> None:
    """A subject that breaks its own declaration is a usage error, not a verdict."""
    if isinstance(error, (SubjectError, BackendError, PlanError)):
        raise error


def _remember(seen: _Seen, found: Findings) -> None:
    seen.facts |= found.facts
    seen.collectives |= found.collectives


def _needs_confirmation(plan: RunPlan, ranks: Ranks, verdict: Verdict) -> bool:
    simulated = ranks.label == "sim" and plan.settings.confirm
    return simulated and verdict.outcome in ("WRONG", "ERROR")


def _confirmed(
    plan: RunPlan, subject: Subject, case: Case, tp_size: int, dtype: str, simulated: Verdict
) -> Verdict:
    """Hold a failure seen only in simulation against real ranks before it counts."""
    if tp_size > CONFIRM_UP_TO or tp_size == 1:
        note = f"simulated only: tp={tp_size} was not confirmed on real ranks"
        return replace(simulated, reasons=(*simulated.reasons, note))
    settings = replace(plan.settings, tp_sizes=(tp_size,))
    with open_ranks("gloo", tp_size, None) as ranks:
        investigation = Investigation(ranks, plan.ref, subject, case, dtype, settings)
        drawn = subject.options.spec if subject.options.specs is not None else None
        real = _verdict(plan, investigation, subject, drawn, case, tp_size, dtype, _Seen())
    if real.outcome == simulated.outcome:
        return replace(simulated, reasons=(*simulated.reasons, "confirmed on gloo"))
    note = (
        f"{simulated.outcome} in simulation but {real.outcome} on gloo: the subject shares process"
        " state between ranks, so use --backend gloo"
    )
    return replace(real, reasons=(*real.reasons, note))


def _report(plan: RunPlan, verdicts: tuple[Verdict, ...], seen: _Seen) -> Report:
    facts = environment.collect()
    facts |= {"backend": seen.label, "subject": seen.facts}
    differences = [] if seen.label == "nccl" else [f"backend {seen.label}, not nccl"]
    path = Path(seen.label, seen.collectives, not differences, tuple(differences))
    return Report(
        subject=plan.ref.label,
        verdicts=verdicts,
        environment=facts,
        path=path,
        tpcheck=environment.tpcheck_version(),
        notes=_notes(plan, seen),
    )


def _notes(plan: RunPlan, seen: _Seen) -> tuple[str, ...]:
    sizes = ", ".join(map(str, plan.tp_sizes))
    degrees = () if plan.asked else (f"degrees {sizes} are those of the default that can be run",)
    said = seen.facts.get("note")
    return (*degrees, str(said)) if said else degrees


@dataclass(frozen=True, slots=True)
class FaultResult:
    """Which checks caught one planted fault, at every degree and dtype it was planted at.

    caught_by: checks that failed everywhere. drift_ratio: the smallest eN/e1 seen. expected: the
    check that has to catch it. drift: whether drift alone did, everywhere. reason: why it did not.
    """

    fault: str
    thread: str
    expected: str
    caught_by: tuple[str, ...]
    drift: bool
    drift_expected: bool
    cases_needed: int
    reason: str | None

    @property
    def survived(self) -> bool:
        """True when the check that names it missed it, or drift missed what it can see."""
        return self.expected not in self.caught_by or (self.drift_expected and not self.drift)


def selfcheck(
    tp_sizes: Sequence[int] = DEFAULT_TP_SIZES,
    dtypes: Sequence[str] = ("bfloat16",),
    *,
    backend: str = "sim",
    seed: int = 0,
    faults: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[FaultResult]:
    """Plant every known fault in the reference decoder and say which check catches it.

    Simulated failures are not confirmed on real ranks here: the faults are known to be faults.

    Raises:
        TPCheckError: an unknown fault, degree, dtype or backend.
    """
    names = list(FAULTS if faults is None else faults)
    results = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names), name)
        results.append(_planted(name, tp_sizes, dtypes, backend, seed))
    if progress is not None:
        progress(len(names), len(names), "done")
    return results


def _planted(
    name: str, tp_sizes: Sequence[int], dtypes: Sequence[str], backend: str, seed: int
) -> FaultResult:
    fault = FAULTS.get(name)
    if fault is None:
        raise SubjectError(f"fault={name!r}, but should be one of {', '.join(FAULTS)}")
    shown = [dtype for dtype in dtypes if not fault.dtypes or dtype in fault.dtypes]
    report = run(
        f"builtin:llama-tiny+{name}",
        [size for size in tp_sizes if size >= fault.min_tp],
        backend=backend,
        dtypes=shown or fault.dtypes,
        seed=seed,
        confirm=False,
    )
    failed = [
        {check for check, result in verdict.checks.items() if result.outcome == FAIL}
        for verdict in report.verdicts
    ]
    everywhere = set.intersection(*failed)
    return FaultResult(
        fault=name,
        thread=fault.thread,
        expected=fault.caught_by,
        caught_by=tuple(check for check in CHECK_NAMES if check in everywhere),
        drift="drift" in everywhere,
        drift_expected=fault.drift,
        cases_needed=1,
        reason=None if fault.drift else fault.reason,
    )
