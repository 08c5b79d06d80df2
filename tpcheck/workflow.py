"""Every loop over cases, degrees and dtypes: the Python API behind the command line.

Requirement: one pass through the cases, each judged at every degree and dtype, on warm ranks; a
case that fails costs only itself; and the report says what carried the run and whether that is the
path a deployment would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tpcheck import environment
from tpcheck.generated import generated_verdicts
from tpcheck.groups.jobs import Ranks
from tpcheck.groups.opening import open_ranks
from tpcheck.groups.surroundings import one_thread
from tpcheck.investigation import Settings
from tpcheck.judging import CaseJudge, Seen
from tpcheck.numerics.tolerance import users_tolerance
from tpcheck.provenance import engine_facts, range_tested
from tpcheck.records import PASS, Path, Report, Verdict
from tpcheck.run_plan import (
    RunPlan,
    make_run_plan,
    positive,
    repro_options,
)
from tpcheck.sensitivity import with_sensitivity
from tpcheck.subjects import make_ref, resolve

Progress = Callable[[int, int, str], None]


def run(
    subject: str | Callable[..., Any],
    tp_sizes: Sequence[int] | None = None,
    *,
    backend: str = "auto",
    ranks_per_gpu: int | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    cases: int | None = None,
    max_failures: int | None = None,
    case: str | None = None,
    until: str | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    atol: float | None = None,
    rtol: float | None = None,
    preset: str | None = None,
    sensitivity: bool = False,
    timeout_s: float = 120.0,
    confirm: bool = True,
    reduction: str = "ring",
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
        cases: how many cases to try: seeds seed, seed+1, ..., 1 by default; for a subject that
            takes specs, how many to generate, 25 by default.
        max_failures: stop after this many verdicts that are not PASS; a search of generated cases
            stops at the first unless this says otherwise.
        case: the id of the one case to run, as a report prints it.
        until: FQN of the traced module after which localization stops.
        batch: rows per input, 2 by default.
        seq_len: longest input, by default the subject's own.
        seed: of the first case.
        atol: a user's tolerance against TP=1; failing it is DRIFT.
        rtol: its relative part.
        preset: a named tolerance, `seed-1e-2`.
        sensitivity: plant faults in the subject and say which of them the checks catch.
        timeout_s: seconds one case may take at one degree.
        confirm: hold failures seen in simulation only against real ranks.
        reduction: how simulated ranks sum, and what drift is held against: ring, tree, wide,
            fp32_wire, fp16_wire, fp8_wire, int8_wire, int6_wire or int4_wire; needs backend sim.
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
            reduction=reduction,
        ),
        options=repro_options(backend, batch, seq_len, atol, rtol, preset),
    )
    seen = Seen()
    world = max(plan.tp_sizes)
    with one_thread(), open_ranks(plan.backend, world, plan.ranks_per_gpu, reduction) as ranks:
        seen.label = ranks.label
        verdicts = tuple(judged(plan, ranks, seen, progress))
        report = report_of(plan, verdicts, seen)
        return with_sensitivity(report, plan, ranks, progress) if sensitivity else report


def judged(plan: RunPlan, ranks: Ranks, seen: Seen, progress: Progress | None) -> Iterator[Verdict]:
    """Yield every verdict of a plan, case by case; `seen` collects what runs leave behind."""
    verdicts_of = _verdicts if plan.cases else generated_verdicts
    return verdicts_of(plan, ranks, seen, progress)


def _verdicts(
    plan: RunPlan, ranks: Ranks, seen: Seen, progress: Progress | None
) -> Iterator[Verdict]:
    total = len(plan.cases) * len(plan.dtypes) * len(plan.tp_sizes)
    done = failures = 0
    for case in plan.cases:
        for dtype in plan.dtypes:
            judge = CaseJudge(plan, ranks, case, dtype, seen, plan.settings)
            for tp_size in plan.tp_sizes:
                if progress is not None:
                    progress(done, total, f"{case.id} tp={tp_size} {dtype}")
                verdict = judge.confirmed(tp_size)
                yield verdict
                done += 1
                failures += verdict.outcome != PASS
                if plan.max_failures is not None and failures >= plan.max_failures:
                    return
    if progress is not None:
        progress(done, total, "done")


def report_of(plan: RunPlan, verdicts: tuple[Verdict, ...], seen: Seen) -> Report:
    """Return the report of a plan's verdicts, with what carried them."""
    facts = environment.collect(device="cuda" if seen.label.startswith("nccl") else "cpu")
    facts |= {"backend": seen.label, "subject": seen.facts}
    differences = [] if seen.label == "nccl" else [f"backend {seen.label}, not nccl"]
    if plan.settings.reduction != "ring":
        differences.append(f"reduction {plan.settings.reduction}, emulated")
    if seen.facts.get("compiler_bypassed"):
        differences.append("compiled code ran eagerly, not torch.compile")
    path = Path(seen.label, seen.collectives, not differences, tuple(differences))
    return Report(
        subject=plan.ref.label,
        verdicts=verdicts,
        environment=facts,
        path=path,
        tpcheck=environment.tpcheck_version(),
        notes=_notes(plan, seen),
        model=plan.model.facts(),
        engine=engine_facts(plan.ref, _arguments(plan, seen)),
        tested=tuple(range_tested(plan.subject, verdicts)),
        reduction={
            "kind": plan.settings.reduction,
            "basis": "emulated" if seen.label == "sim" else "assumed",
        },
        created=environment.utc_now(),
    )


def _arguments(plan: RunPlan, seen: Seen) -> dict[str, Any]:
    """Return what the subject was told to run as: what its own launch would be given."""
    facts = {name: value for name, value in seen.facts.items() if name != "note"}
    return {
        "backend": seen.label,
        "tp_sizes": list(plan.tp_sizes),
        "dtypes": list(plan.dtypes),
        "ranks_per_gpu": plan.ranks_per_gpu,
        "options": list(plan.options),
        "subject": facts,
    }


def _notes(plan: RunPlan, seen: Seen) -> tuple[str, ...]:
    sizes = ", ".join(map(str, plan.tp_sizes))
    degrees = () if plan.asked else (f"degrees {sizes} are those of the default that can be run",)
    said = seen.facts.get("note")
    searched = () if plan.cases else (_searched(plan, seen),)
    unknown = plan.model.reason
    digest = (f"the model has no digest, which a receipt needs: {unknown}",) if unknown else ()
    more = seen.facts.get("not_compared")
    first = (
        (f"forward returns {more + 1} tensors, of which the logits, or the first, were compared",)
        if more
        else ()
    )
    return (*degrees, *searched, *digest, *first, *([str(said)] if said else []))


def _searched(plan: RunPlan, seen: Seen) -> str:
    """Say what a search rests on."""
    said = f"up to {plan.limit} generated cases on {seen.label} ranks"
    return f"{said}; {seen.confirmed} verdicts held against gloo" if seen.label == "sim" else said
