"""`tpcheck golden`: record TP=1, verify against what was recorded, list a folder.

Requirement: recording never looks like verifying: it says what it wrote and that nothing was
verified, and what is there and says something else is left alone unless an update is asked for.
Verifying runs; a record that is missing fails, by name. Which records there should be is what was
asked for or, without such a wish, all that the subject's records name: each names those that the
same command was to write, so that one deleted, or never written by a recorder that was killed, is
missed as long as one of them is left.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpcheck.case_runs import CaseRuns
from tpcheck.errors import TPCheckError
from tpcheck.golden.finding import Found, find_record, named_of_weights, named_records
from tpcheck.golden.judging import AgainstRecord
from tpcheck.golden.keeping import DIFFERENT, keep
from tpcheck.golden.making import (
    RECORDED_DEGREES,
    Alone,
    alone_on_ranks,
    alone_streamed,
    identify,
    make_golden,
    of_directory,
)
from tpcheck.golden.records import Golden, Named, case_slug, slug
from tpcheck.golden.store import Entry, prepare, scan
from tpcheck.groups.jobs import JobFailed, Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.investigation import Investigation, Settings
from tpcheck.judging import CaseJudge, Seen, subject_of
from tpcheck.model_digest import ModelDigest
from tpcheck.records import Report, Verdict
from tpcheck.run_plan import RunPlan, make_run_plan, positive
from tpcheck.spec import Case
from tpcheck.subjects import make_ref, resolve
from tpcheck.workflow import Progress, report_of

Json = dict[str, Any]

RECORDING = "tpcheck.golden_recording/1"


def golden_record(
    subject: str | Callable[..., Any],
    directory: str | Path,
    *,
    dtypes: Sequence[str] = ("bfloat16",),
    backend: str = "auto",
    cases: int | None = None,
    case: str | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    full: bool = False,
    update: bool = False,
    stream: bool = False,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> Json:
    """Record TP=1 of a subject's cases in a folder, one case and dtype after the other.

    Args:
        subject: a name or a callable `build(tp) -> forward`, as `tpcheck.run` takes it.
        directory: the folder; made if it is not there.
        dtypes: deployed dtypes: bfloat16, float16, float32.
        backend: where TP=1 is run: auto, sim, gloo or nccl.
        cases: how many seeds, 1 by default.
        case: the id of the one case to record; needed for a subject that takes specs.
        batch: rows per input, 2 by default.
        seq_len: longest input, by default the subject's own.
        seed: of the first case.
        full: keep every logit, not a sketch of them and the largest of a few positions.
        update: replace records of the same subject, case and dtype that say something else.
        stream: run a `ref:DIR` layer by layer, for a checkpoint that fits no single device; goes on
            where it was killed.
        timeout_s: seconds one case may take; not where it is streamed.
        progress: called as (done, in all, what is next).

    Returns:
        `{"schema", "directory", "subject", "outcome", "records"}`: `outcome` is RECORDED, or
        DIFFERENT where a record that says something else was left alone; each record has `file`,
        `case`, `dtype`, `state` (written, replaced, unchanged, different), `bytes` and `reason`.

    Raises:
        TPCheckError: an option, the subject or the folder is unusable, or TP=1 does not run; what
            was recorded before stays.
    """
    folder = Path(directory)
    plan = _plan(
        *(subject, (1,), backend, None, dtypes, timeout_s),
        cases=cases,
        case=case,
        batch=batch,
        seq_len=seq_len,
        seed=seed,
    )
    _require_recordable(plan, folder, stream)
    prepare(folder)
    pairs = [(one, dtype) for one in plan.cases for dtype in plan.dtypes]
    together = tuple((one.id, dtype) for one, dtype in pairs)
    rows = []
    with open_ranks(plan.backend, 1, None) as ranks:
        recorder = _Recorder(plan, ranks, together, folder, full, stream, progress)
        for done, (one, dtype) in enumerate(pairs):
            if progress is not None:
                progress(done, len(pairs), f"{one.id} {dtype}")
            golden, data = recorder.recorded(one, dtype)
            rows.append(keep(folder, golden, data, update=update))
    different = any(row["state"] == DIFFERENT for row in rows)
    return {
        "schema": RECORDING,
        "directory": str(folder),
        "subject": plan.ref.label,
        "outcome": "DIFFERENT" if different else "RECORDED",
        "records": rows,
    }


def _require_recordable(plan: RunPlan, folder: Path, stream: bool) -> None:
    model = [name for name in ("config.json", "params.json") if (folder / name).exists()]
    if model:
        # a record's tensors would count as weights of the model
        raise TPCheckError(f"{folder}: holds {model[0]}, but should be a folder for records alone")
    if not plan.cases:
        raise TPCheckError(
            f"{plan.ref.label} takes specs, and a record is of one model: name it with --case,"
            " as a report of tpcheck run prints it"
        )
    if stream and plan.ref.kind != "ref":
        raise TPCheckError(f"stream: SUBJECT={plan.ref.label}, but should be ref:DIR")


def golden_verify(
    subject: str | Callable[..., Any],
    directory: str | Path,
    tp_sizes: Sequence[int] = (1,),
    *,
    dtypes: Sequence[str] = (),
    backend: str = "auto",
    ranks_per_gpu: int | None = None,
    cases: int | None = None,
    case: str | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> Report:
    """Hold a subject to its records: TP=1 to its bits and function, other degrees to the oracle.

    Args:
        subject: a name or a callable `build(tp) -> forward`, as `tpcheck.run` takes it.
        directory: the folder with the records.
        tp_sizes: degrees to hold to the recorded oracle.
        dtypes: deployed dtypes; with these or any of the next six unset, all that was recorded.
        backend: auto, sim, gloo or nccl.
        ranks_per_gpu: several NCCL ranks on one GPU.
        cases: how many seeds there should be records of.
        case: the id of the one case.
        batch: rows per input.
        seq_len: longest input.
        seed: of the first case.
        timeout_s: seconds one case may take at one degree.
        progress: called as (verdicts done, verdicts in all, what is next).

    Returns:
        A Report with one verdict per (case, degree, dtype); a record that is missing or not to be
        trusted is INCONCLUSIVE, with the check `record`, and never PASS.

    Raises:
        TPCheckError: an option, the subject or the backend is unusable; the message names it.
    """
    folder = Path(directory)
    asked = any(one is not None for one in (cases, case, batch, seq_len, seed)) or bool(dtypes)
    plan = _plan(
        *(subject, tp_sizes, backend, ranks_per_gpu, dtypes or ("bfloat16",), timeout_s),
        cases=cases,
        case=case,
        batch=batch,
        seq_len=seq_len,
        seed=seed or 0,
    )
    entries = scan(folder)
    named = () if asked else _named(entries, plan)
    if not named and not plan.cases:
        raise TPCheckError(
            f"{plan.ref.label} takes specs, and there is no record of it in {folder}: name a case"
            " with --case"
        )
    wanted = named or tuple((one.id, dtype) for one in plan.cases for dtype in plan.dtypes)
    seen = Seen()
    with open_ranks(plan.backend, max(plan.tp_sizes), plan.ranks_per_gpu) as ranks:
        seen.label = ranks.label
        verdicts = tuple(_verdicts(plan, ranks, seen, folder, entries, wanted, progress))
    report = report_of(plan, verdicts, seen)
    return replace(report, notes=(*report.notes, *_notes(entries, folder, plan, wanted)))


def _named(entries: Sequence[Entry], plan: RunPlan) -> tuple[Named, ...]:
    """Return what there should be records of: by the subject's name, else by its very files."""
    named = named_records(entries, plan.ref.label)
    if named or plan.model.digested is None:
        return named
    return named_of_weights(entries, *of_directory(plan.model.digested.digest))


def _plan(
    subject: str | Callable[..., Any],
    tp_sizes: Sequence[int],
    backend: str,
    ranks_per_gpu: int | None,
    dtypes: Sequence[str],
    timeout_s: float,
    **cases: Any,
) -> RunPlan:
    ref = make_ref(subject)
    plan = make_run_plan(
        ref,
        resolve(ref),
        tp_sizes,
        backend=backend,
        ranks_per_gpu=ranks_per_gpu,
        dtypes=dtypes,
        max_failures=None,
        settings=Settings(tp_sizes=(), timeout_s=positive("timeout", timeout_s), locate=False),
        options=() if backend == "auto" else ("--backend", backend),
        **cases,
    )
    degrees = tuple(dict.fromkeys((*RECORDED_DEGREES, *plan.tp_sizes)))
    return replace(plan, settings=replace(plan.settings, tp_sizes=degrees))


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Makes the records of one command."""

    plan: RunPlan
    ranks: Ranks
    together: tuple[Named, ...]
    folder: Path
    full: bool
    stream: bool
    progress: Progress | None

    def recorded(self, case: Case, dtype: str) -> tuple[Golden, bytes]:
        """Run TP=1 of a case and return its record."""
        plan, timeout_s = self.plan, self.plan.settings.timeout_s
        subject = subject_of(plan, case)
        runs = CaseRuns(self.ranks, plan.ref, subject, case, dtype, RECORDED_DEGREES, timeout_s)
        runs.start_clock()
        try:
            identity = identify(self.ranks, runs, case, _directory(plan), timeout_s)
            alone = self._alone(runs, case)
        except JobFailed as error:
            exception = error.failure.exception
            if isinstance(exception, TPCheckError):
                raise exception from None
            raise TPCheckError(
                f"{plan.ref.label}: TP=1 does not run, so it was not recorded [{case.id} {dtype}]:"
                f" {error.failure.message}"
            ) from error
        plan.model.facts()  # raises where the directory changed meanwhile
        return make_golden(
            subject,
            case,
            identity,
            alone,
            label=plan.ref.label,
            together=self.together,
            full=self.full,
            command=self._command(case, dtype),
            backend=self.ranks.label,
        )

    def _alone(self, runs: CaseRuns, case: Case) -> Alone:
        if not self.stream:
            return alone_on_ranks(runs, case)
        scratch = self.folder / f".{slug(self.plan.ref.label)}.{case_slug(case.id)}.stream"
        alone = alone_streamed(runs, case, Path(str(self.plan.ref.value)), scratch, self.progress)
        with contextlib.suppress(OSError):  # what is in it was removed by who made it
            scratch.rmdir()
        return alone

    def _command(self, case: Case, dtype: str) -> str:
        words = ["tpcheck", "golden", "record", self.plan.ref.label, str(self.folder)]
        words += ["--dtype", dtype, "--case", case.id, *self.plan.options]
        words += ["--full"] if self.full else []
        return shlex.join([*words, *(["--stream"] if self.stream else [])])


def _verdicts(
    plan: RunPlan,
    ranks: Ranks,
    seen: Seen,
    folder: Path,
    entries: Sequence[Entry],
    wanted: Sequence[Named],
    progress: Progress | None,
) -> Iterable[Verdict]:
    total, done = len(wanted) * len(plan.tp_sizes), 0
    for case_id, dtype in wanted:
        case = Case.parse(case_id)

        def held(of: Investigation, case: Case = case) -> AgainstRecord:
            def find() -> Found:
                timeout_s = plan.settings.timeout_s
                identity = identify(ranks, of.runs, case, _directory(plan), timeout_s)
                return find_record(
                    folder, entries, plan.ref.label, (case.id, of.runs.dtype), identity
                )

            return AgainstRecord(of, find, beside_tp1=1 in plan.tp_sizes)

        judge = CaseJudge(plan, ranks, case, dtype, seen, plan.settings).judged_by(held)
        for tp_size in plan.tp_sizes:
            if progress is not None:
                progress(done, total, f"{case_id} tp={tp_size} {dtype}")
            verdict = judge.verdict(tp_size)
            yield replace(verdict, repro=_repro(plan, folder, verdict))
            done += 1


def _directory(plan: RunPlan) -> ModelDigest | None:
    """Return the digest of a model directory.

    Raises:
        TPCheckError: the subject is one, and it has no digest.
    """
    if plan.model.reason:
        raise TPCheckError(f"{plan.ref.label}: has no digest to record: {plan.model.reason}")
    return None if plan.model.digested is None else plan.model.digested.digest


def _repro(plan: RunPlan, folder: Path, verdict: Verdict) -> str:
    words = ["tpcheck", "golden", "verify", plan.ref.label, str(folder)]
    words += ["--tp", str(verdict.tp_size), "--dtype", verdict.dtype, "--case", verdict.case_id]
    return shlex.join([*words, *plan.options])


def _notes(
    entries: Sequence[Entry], folder: Path, plan: RunPlan, wanted: Sequence[Named]
) -> tuple[str, ...]:
    ours = {e.golden.named for e in entries if e.golden and e.golden.subject == plan.ref.label}
    left = len(ours - set(wanted))
    bad = [e.file for e in entries if e.state not in ("ok", "temporary")]
    notes = [f"{left} more records of this subject were not verified"] if left else []
    others = sorted({e.golden.subject for e in entries if e.golden is not None})
    if others and not ours:
        notes.append(
            f"no record is called {plan.ref.label}, so those of the same weights, config and inputs"
            f" counted; recorded are {', '.join(others[:3])}"
        )
    if bad:
        notes.append(f"{len(bad)} files of {folder} are no good: tpcheck golden list {folder}")
    return tuple(notes)
