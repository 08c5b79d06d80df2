"""What a run is asked to do, checked whole before a process is started.

Requirement: validate every argument, name the value and the way out, and lose nothing: an option
that cannot work is an error before the first rank exists, never after the last.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tpcheck.errors import TPCheckError
from tpcheck.groups.opening import backend_room
from tpcheck.investigation import Settings
from tpcheck.provenance import WatchedModel, watch_model
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.spec import MAX_SEED, Case
from tpcheck.subjects import Subject, SubjectRef, assert_takes_the_group

DEFAULT_TP_SIZES = (2, 4, 8)
DEFAULT_BATCH = 2
DEFAULT_GENERATED = 25
"""Cases of a subject that takes specs, where --cases does not say: seconds on simulated ranks."""
MAX_CASES = 1_000_000
"""Days of work; many more would take hours to number."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything a run needs, checked before a process is started.

    `cases` are those to run; none where up to `limit` are to be generated, with `seed`, `batch` and
    `seq_len` as asked.
    """

    ref: SubjectRef
    subject: Subject
    tp_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    cases: tuple[Case, ...]
    limit: int
    seed: int
    batch: int | None
    seq_len: int | None
    settings: Settings
    backend: str
    ranks_per_gpu: int | None
    max_failures: int | None
    options: tuple[str, ...]
    asked: bool
    model: WatchedModel


def make_run_plan(
    ref: SubjectRef,
    subject: Subject,
    tp_sizes: Sequence[int] | None,
    *,
    backend: str,
    ranks_per_gpu: int | None,
    dtypes: Sequence[str],
    cases: int | None,
    max_failures: int | None,
    case: str | None,
    batch: int | None,
    seq_len: int | None,
    seed: int,
    settings: Settings,
    options: tuple[str, ...],
) -> RunPlan:
    _require_dtypes(dtypes)
    whole = {"cases": cases, "batch": batch, "seq_len": seq_len, "max_failures": max_failures}
    for name, value in whole.items():
        if value is not None:
            _require_whole(name, value, at_least=1)
    _require_whole("seed", seed, at_least=0)
    assert_takes_the_group(subject)
    longest = subject.options.seq_len
    one = None if case is None else Case.parse(case)
    asked_len = seq_len if one is None else one.seq_len
    if asked_len is not None and asked_len > longest > 0 and subject.options.spec is None:
        raise TPCheckError(
            f"seq_len={asked_len}, but should be at most {longest},"
            f" the longest {subject.name} takes"
        )
    degrees = _degrees(subject, tp_sizes, backend, ranks_per_gpu)
    first = Case(seed, batch or DEFAULT_BATCH, seq_len or longest)
    generates = subject.options.specs is not None and one is None
    chosen = "sim" if generates and backend == "auto" else backend
    if settings.reduction != "ring" and chosen != "sim":
        raise TPCheckError(
            f"reduction={settings.reduction!r} is emulated, so it needs backend sim, not {chosen}"
        )
    limit = cases or (DEFAULT_GENERATED if generates else 1)
    if limit > MAX_CASES:
        raise TPCheckError(f"cases={limit}, but should be at most {MAX_CASES}")
    if seed + limit - 1 > MAX_SEED:
        raise TPCheckError(f"seed={seed}, but seeds of {limit} cases should not pass {MAX_SEED}")
    _require_room(subject, one or first)
    several = tuple(replace(first, seed=seed + offset) for offset in range(limit))
    fixed = several if one is None else (one,)
    if one is not None and (one.spec is None) != (subject.options.specs is None):
        raise TPCheckError(_wrong_kind_of_case(subject, one))
    return RunPlan(
        ref=ref,
        subject=subject,
        tp_sizes=degrees,
        dtypes=tuple(dict.fromkeys(dtypes)),
        cases=() if generates else fixed,
        limit=limit,
        seed=seed,
        batch=batch,
        seq_len=seq_len,
        settings=replace(settings, tp_sizes=degrees),
        backend=chosen,
        ranks_per_gpu=ranks_per_gpu,
        max_failures=max_failures,
        options=options,
        asked=tp_sizes is not None,
        model=watch_model(ref),
    )


def _wrong_kind_of_case(subject: Subject, case: Case) -> str:
    if case.spec is None:
        return (
            f"case={case.id!r}: {subject.name} takes specs, so a case should carry one:"
            ' s7-b2-t16+{"vocab_size":...}, as a report prints it'
        )
    return f"case={case.id!r} carries a spec, but {subject.name} takes none"


def _degrees(
    subject: Subject, asked: Sequence[int] | None, backend: str, ranks_per_gpu: int | None
) -> tuple[int, ...]:
    """Return what was asked for, or the defaults that the plan and the backend allow."""
    if asked is not None:
        if isinstance(asked, (int, str)):
            raise TPCheckError(f"tp={asked!r}, but should be several degrees: (2, 4, 8)")
        for size in asked:
            _require_whole("tp", size, at_least=1)
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


def _require_dtypes(dtypes: Sequence[str]) -> None:
    if isinstance(dtypes, str) or not dtypes:
        raise TPCheckError(f'dtypes={dtypes!r}, but should be several: ("bfloat16", "float16")')
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TPCheckError(f"dtype={dtype!r}, but should be one of {', '.join(DTYPES)}")


def _require_whole(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise TPCheckError(f"{name}={value!r}, but should be a whole number of at least {at_least}")


def _require_room(subject: Subject, case: Case) -> None:
    """Refuse what no machine of this size can hold, before it is tried for an hour."""
    needed = case.batch * max(1, case.seq_len) * max(1, subject.options.vocab_size) * 8
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise TPCheckError(
            f"batch={case.batch}, seq_len={case.seq_len}: the float64 logits alone take"
            f" {needed / 2**30:.4g} GiB and this machine has {memory / 2**30:.4g} GiB;"
            " ask for fewer rows or tokens"
        )


def repro_line(plan: RunPlan, case: Case, tp_size: int, dtype: str) -> str:
    if plan.ref.kind == "pickled" or plan.settings.reduction != "ring":
        return _python_repro(plan, case, tp_size, dtype)
    words = ["tpcheck", "run", plan.ref.label, "--tp", str(tp_size), "--dtype", dtype]
    words += ["--seed", str(case.seed), "--case", case.id, *plan.options]
    return shlex.join(words)


def _python_repro(plan: RunPlan, case: Case, tp_size: int, dtype: str) -> str:
    name = plan.ref.label.rpartition(":")[2].rpartition(".")[2]
    name = name if name.isidentifier() else "build"
    arguments = [name if plan.ref.kind == "pickled" else repr(plan.ref.label), f"({tp_size},)"]
    arguments += [f"dtypes=({dtype!r},)", f"case={case.id!r}"]
    for option, value in zip(plan.options[::2], plan.options[1::2], strict=True):
        text = value if option in ("--atol", "--rtol") else repr(value)
        arguments.append(f"{option.removeprefix('--')}={text}")
    if plan.settings.reduction != "ring":  # no option of the command line
        arguments.append(f"reduction={plan.settings.reduction!r}")
    return f"tpcheck.run({', '.join(arguments)})"


def repro_options(
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


def positive(name: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not value > 0:
        raise TPCheckError(f"{name}={value!r}, but should be more than 0 seconds")
    return value
