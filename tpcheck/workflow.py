"""Every loop over cases, degrees and dtypes: the Python API behind the command line.

Requirement: one pass through the cases, each judged at every degree and dtype, on warm ranks; a
case that fails costs only itself; and the report says what carried the run and whether that is the
path a deployment would take.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck import environment
from tpcheck.errors import BackendError, IllegalDegreeError, PlanError, SubjectError, TPCheckError
from tpcheck.groups.jobs import Ranks
from tpcheck.investigation import Findings, Investigation, JobFailed, Settings
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.records import Path, Report, Verdict
from tpcheck.shard_plan import legal_tp_sizes, make_shard_plan
from tpcheck.spec import Case, ModelSpec
from tpcheck.strategies import draw_spec
from tpcheck.subjects import Subject, SubjectRef, make_ref, resolve, with_spec
from tpcheck.verdict import accepted_illegal, judge, judge_failure, refused, refused_as_planned

DEFAULT_TP_SIZES = (2, 4, 8)
DEFAULT_BATCH = 2
DTYPES = ("bfloat16", "float16", "float32")
BACKENDS = ("auto", "sim", "gloo", "nccl")
CONFIRM_UP_TO = 16
"""Largest degree whose simulated failure is confirmed on real ranks: more processes than that
cost minutes on a laptop."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Everything a run needs, checked before a process is started."""

    ref: SubjectRef
    subject: Subject
    tp_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    cases: tuple[Case, ...]
    settings: Settings
    backend: str
    ranks_per_gpu: int | None
    max_failures: int | None
    options: tuple[str, ...]
    asked: bool


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
    plan = _make_plan(
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
            timeout_s=_positive("timeout", timeout_s),
            until=until or "",
        ),
        options=_repro_options(backend, batch, seq_len, atol, rtol, preset),
    )
    seen = _Seen()
    with open_ranks(plan.backend, max(plan.tp_sizes), plan.ranks_per_gpu) as ranks:
        seen.label = ranks.label
        verdicts = tuple(_verdicts(plan, ranks, seen, progress))
    return _report(plan, verdicts, seen)


def _make_plan(
    ref: SubjectRef,
    subject: Subject,
    tp_sizes: Sequence[int] | None,
    *,
    backend: str,
    ranks_per_gpu: int | None,
    dtypes: Sequence[str],
    cases: int,
    max_failures: int | None,
    case: str | None,
    batch: int | None,
    seq_len: int | None,
    seed: int,
    settings: Settings,
    options: tuple[str, ...],
) -> _Plan:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TPCheckError(f"dtype={dtype!r}, but should be one of {', '.join(DTYPES)}")
    for name, value in (("cases", cases), ("batch", batch), ("seq_len", seq_len)):
        if value is not None and value < 1:
            raise TPCheckError(f"{name}={value}, but should be at least 1")
    if seed < 0:
        raise TPCheckError(f"seed={seed}, but should be at least 0")
    longest = subject.options.seq_len
    if seq_len is not None and longest and seq_len > longest and subject.options.spec is None:
        raise TPCheckError(
            f"seq_len={seq_len}, but should be at most {longest}, the longest {subject.name} takes"
        )
    degrees = _degrees(subject, tp_sizes, backend, ranks_per_gpu)
    first = Case(seed, batch or DEFAULT_BATCH, seq_len or longest)
    chosen = (
        (Case.parse(case),)
        if case is not None
        else tuple(replace(first, seed=seed + offset) for offset in range(cases))
    )
    return _Plan(
        ref=ref,
        subject=subject,
        tp_sizes=degrees,
        dtypes=tuple(dict.fromkeys(dtypes)),
        cases=chosen,
        settings=replace(settings, tp_sizes=degrees),
        backend=backend,
        ranks_per_gpu=ranks_per_gpu,
        max_failures=max_failures,
        options=options,
        asked=tp_sizes is not None,
    )


def _degrees(
    subject: Subject, asked: Sequence[int] | None, backend: str, ranks_per_gpu: int | None
) -> tuple[int, ...]:
    """Return what was asked for, or the defaults that the plan and the backend allow."""
    if asked is not None:
        for size in asked:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise TPCheckError(f"tp={size!r}, but should be a whole number of at least 1")
        if not asked:
            raise TPCheckError("tp is empty, but should name at least one degree")
        return tuple(dict.fromkeys(asked))
    degrees = list(DEFAULT_TP_SIZES)
    spec = subject.options.spec
    if spec is not None and subject.options.specs is None:
        legal = legal_tp_sizes(spec, up_to=max(degrees))
        degrees = [size for size in degrees if size in legal]
    room = backend_room(backend, ranks_per_gpu)
    fitting = tuple(size for size in degrees if size <= room)
    if not fitting:
        raise TPCheckError(
            f"none of the default degrees 2, 4, 8 can be run for {subject.name};"
            " name degrees with --tp"
        )
    return fitting


def _verdicts(
    plan: _Plan, ranks: Ranks, seen: _Seen, progress: Progress | None
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
                if ranks.label == "sim" and verdict.outcome in ("WRONG", "ERROR"):
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
    plan: _Plan,
    investigation: Investigation,
    subject: Subject,
    drawn: ModelSpec | None,
    case: Case,
    tp_size: int,
    dtype: str,
    seen: _Seen,
) -> Verdict:
    repro = _repro(plan, case, tp_size, dtype)
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


def _confirmed(
    plan: _Plan, subject: Subject, case: Case, tp_size: int, dtype: str, simulated: Verdict
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


@contextmanager
def open_ranks(backend: str, size: int, ranks_per_gpu: int | None) -> Iterator[Ranks]:
    """Yield ranks of a backend that can hold `size`; real ones stay warm for the session.

    Raises:
        BackendError: the backend cannot hold that many ranks here.
    """
    chosen = _chosen_backend(backend, size, ranks_per_gpu)
    if chosen == "sim":
        from tpcheck.groups.simulated import SimulatedRanks

        simulated = SimulatedRanks()
        try:
            yield simulated
        finally:
            simulated.close()
        return
    from tpcheck.groups.pool import get_pool
    from tpcheck.groups.torchrun import driver_ranks

    world = driver_ranks(chosen)
    if world is not None and size > world.max_size:
        raise BackendError(
            f"tp={size}, but should be at most WORLD_SIZE={world.max_size} under torchrun"
        )
    yield world if world is not None else get_pool(chosen, size, ranks_per_gpu)


def backend_room(backend: str, ranks_per_gpu: int | None) -> int:
    """Return how many ranks a backend can hold here."""
    from tpcheck.groups.nccl import visible_gpu_count
    from tpcheck.groups.torchrun import torchrun_world

    world = torchrun_world()
    if world is not None:
        return world.size
    if backend == "nccl":
        room: int = max(1, visible_gpu_count()) * (ranks_per_gpu or 1)
        return room
    return 64


def _chosen_backend(backend: str, size: int, ranks_per_gpu: int | None) -> str:
    if backend not in BACKENDS:
        raise TPCheckError(f"backend={backend!r}, but should be one of {', '.join(BACKENDS)}")
    if ranks_per_gpu is not None and backend != "nccl":
        raise TPCheckError(f"ranks_per_gpu={ranks_per_gpu} needs backend nccl, not {backend}")
    if backend != "auto":
        return backend
    from tpcheck.groups.nccl import visible_gpu_count

    return "nccl" if visible_gpu_count() >= size else "gloo"


def _report(plan: _Plan, verdicts: tuple[Verdict, ...], seen: _Seen) -> Report:
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
        notes=() if plan.asked else (f"degrees: {', '.join(map(str, plan.tp_sizes))} (default)",),
    )


def _repro(plan: _Plan, case: Case, tp_size: int, dtype: str) -> str:
    if plan.ref.kind == "pickled":
        return (
            f"tpcheck.run({plan.ref.label.split(':')[-1].split('.')[-1]}, ({tp_size},),"
            f" dtypes=({dtype!r},), case={case.id!r})"
        )
    words = ["tpcheck", "run", plan.ref.label, "--tp", str(tp_size), "--dtype", dtype]
    words += ["--seed", str(case.seed), "--case", case.id, *plan.options]
    return shlex.join(words)


def _repro_options(
    backend: str,
    batch: int | None,
    seq_len: int | None,
    atol: float | None,
    rtol: float | None,
    preset: str | None,
) -> tuple[str, ...]:
    given = {"--backend": backend, "--atol": atol, "--rtol": rtol, "--preset": preset}
    return tuple(
        word
        for option, value in given.items()
        if value not in (None, "auto")
        for word in (option, str(value))
    )


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise TPCheckError(f"{name}={value}, but should be more than 0 seconds")
    return value
