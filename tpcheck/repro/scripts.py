"""Which script shows a failure: the candidates, shortest way first, each run before it is given."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from tpcheck.execution import AGAIN, Task
from tpcheck.groups.jobs import Job, JobResult
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.inputs import make_inputs
from tpcheck.observation.program import INPUT, WEIGHT, Program
from tpcheck.repro.cuts import cut_view, differing_meetings
from tpcheck.repro.harness import limit, recorded_script
from tpcheck.repro.values import Unwritable
from tpcheck.repro.views import View, module_view, whole_view
from tpcheck.repro.wording import WIDTH, Writer, laid_out, wrapped
from tpcheck.spec import Case, ModelSpec
from tpcheck.subjects import Subject, SubjectRef, make_ref, resolve, with_spec

MAX_LINES = 40
_TIMEOUT_S = 20.0
_FAITHFUL = 1e-6
"""Values are written with 8 digits, so a script gives what was recorded up to this."""
_MODULES_TRIED = 80
_LAYOUTS = ((False, 80), (True, 80), (True, 104))
"""Several statements on one line or not, and how long an expression may get; the first that fits
the page, else the last."""
_SHOWN = {"": "", "A": "", AGAIN: ", the same input a second time", "decode": ", decoded"}


@dataclass(frozen=True, slots=True)
class Repro:
    """A script, or the reason why there is none."""

    script: str
    reason: str = ""


def repro_script(
    subject: SubjectRef | str | Callable[..., Any],
    *,
    tp_size: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    batch: int = 1,
    seq_len: int = 1,
    spec: ModelSpec | None = None,
    fqn: str = "",
) -> str:
    """Return a script of at most 40 lines that shows a failing case with torch alone, or "".

    Args:
        dtype: what weights are stored in; the script itself computes in float64.
        spec: the drawn spec, for a subject that takes one.
        fqn: the first module that diverges, where it is known.
    """
    return make_repro(
        subject,
        tp_size=tp_size,
        seed=seed,
        dtype=dtype,
        batch=batch,
        seq_len=seq_len,
        spec=spec,
        fqn=fqn,
    ).script


def make_repro(
    subject: SubjectRef | str | Callable[..., Any],
    *,
    tp_size: int,
    seed: int = 0,
    dtype: str = "bfloat16",
    batch: int = 1,
    seq_len: int = 1,
    spec: ModelSpec | None = None,
    fqn: str = "",
) -> Repro:
    """Return the script of a failing case, or the reason why there is none; see `repro_script`."""
    ref = make_ref(subject)
    resolved = resolve(ref) if spec is None else with_spec(resolve(ref), spec)
    case = Case(seed, batch, seq_len, spec)
    inputs = {"A": make_inputs(resolved, case, (tp_size,))["A"]}
    task = Task(ref, seed, "float64", dtype, inputs, ("A",), spec, every_output=True)
    try:
        return _recorded(task, tp_size, resolved, fqn)
    except Unwritable as refusal:
        return Repro("", str(refusal))


_Written = tuple[list[str], list[str], View, bool]
"""Lines that define, lines that use, what they show, and whether weights have their own names."""


def _title(name: str) -> str:
    return name.rpartition(":" if name.startswith("tpcheck.") else "/")[2]


@dataclass(frozen=True, slots=True)
class _Taken:
    """The programs of TP=1 and of every rank of TP=N, and the output that differs.

    Where TP=N failed, those of TP=N alone and "". raises: the exception a torch call ended in.
    """

    programs: tuple[Program, ...]
    output: str
    raises: str = ""


def _recorded(task: Task, tp_size: int, subject: Subject, fqn: str) -> Repro:
    name = _title(subject.name)
    for dtype in ("float64", task.weight_dtype)[not subject.options.float64 :]:
        tried = replace(task, dtype=dtype)
        taken = _take(tried, tp_size)
        if taken is not None:
            return _written(taken, tried, tp_size, name, fqn)
    return Repro("", f"TP={tp_size} agrees with TP=1 on simulated ranks")


def _written(taken: _Taken, task: Task, tp_size: int, name: str, fqn: str) -> Repro:
    reasons: list[str] = []
    faithful = False
    for candidate in _candidates(taken, task, tp_size, name, fqn):
        try:
            defined, used, view, exact = candidate()
        except Unwritable as refusal:
            reasons.append(str(refusal))
            continue
        if exact:  # what follows is the same program on weights of its own
            faithful = _faithful(defined, view, task.dtype)
        lines = [*defined, *used]
        script = "\n".join(lines) + "\n"
        if not faithful:
            reasons.append("the recorded program does not give what was recorded")
        elif len(lines) > MAX_LINES or any(len(line) > WIDTH for line in lines):
            reasons.append(f"the program takes {len(lines)} lines")
        elif shows_failure(script, taken.raises):
            return Repro(script)
        else:
            reasons.append("the recorded program does not show it")
    return Repro("", reasons[0] if reasons else "there is nothing to write")


def shows_failure(script: str, raises: str = "") -> bool:
    """Whether a script, run as a program, exits with 1, or ends in the exception named `raises`."""
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(script, "<repro>", "exec"), space)
    except SystemExit as end:
        one = space.get("one")
        sound = one is None or (bool(one.isfinite().all()) and bool(one.double().norm() > 0))
        return bool(end.code) and not raises and sound
    except Exception as error:
        return type(error).__name__ == raises
    return False


def _faithful(defined: Sequence[str], view: View, dtype: str) -> bool:
    """Whether the program, run on what was recorded, gives what was recorded, TP=1 and TP=N."""
    space: dict[str, Any] = {"__name__": "repro"}
    results = {p: view.result(p) for p in view.roots}
    tolerance = _FAITHFUL if dtype == "float64" else limit(dtype)
    try:
        exec(compile("\n".join(defined), "<repro>", "exec"), space)
        space["w"] = lambda *asked, **_: view.weights[asked].clone()
        space |= {view.inputs[key][0]: value for key, value in view.given.items()}
        for size in {n for n, _ in view.places} if results[0] is not None else ():
            made = space["run"](size)
            for p, (n, r) in enumerate(view.places):
                known = results[p] if view.same_start or n == 1 else None
                if n == size and known is not None and _differ(made[r], known, tolerance):
                    return False
    except (Exception, SystemExit):
        return False
    return True


def _take(task: Task, tp_size: int) -> _Taken | None:
    """Record until something fails: one forward, the same input again, decoding."""
    for changes, output in (
        ({}, "A"),
        ({"order": ("A", "A")}, AGAIN),
        ({"decode": True}, "decode"),
    ):
        changed = replace(task, **changes)
        ranks = SimulatedRanks()
        _run(ranks, changed, 1)  # fills caches, so that both recordings see the same calls
        one, alone = _run(ranks, changed, 1)
        many, programs = _run(ranks, changed, tp_size)
        ranks.close()
        refusals = [p.refusal for p in (*alone, *programs) if p.refusal]
        if one.failure is not None:
            raise Unwritable(f"TP=1 fails: {one.failure.message}")
        if refusals:
            raise Unwritable(refusals[0])
        if many.failure is not None:
            return _Taken(tuple(programs), "", _raised(programs))
        if output not in one.replies[0].outputs:
            continue
        if any(output not in reply.outputs for reply in many.replies):
            raise Unwritable("only rank 0 returns logits: a script compares every rank's")
        expected, outputs = (
            one.replies[0].outputs[output],
            [r.outputs[output] for r in many.replies],
        )
        digests = {reply.digests[output] for reply in many.replies}
        if len(digests) > 1 or _differ(outputs[0], expected, limit(task.dtype)):
            return _Taken((*alone, *programs), output)
    return None


def _raised(programs: Sequence[Program]) -> str:
    """Return the type of the exception that a torch call of some rank ended in.

    Raises:
        Unwritable: a rank raised it in its own code: nothing that torch does shows it.
    """
    ends = [p.steps[-1].raises for p in programs if p.steps and p.steps[-1].raises]
    errors = [p for p in programs if p.error]
    if errors and not ends:
        raise Unwritable(f"rank {errors[0].rank} raises {errors[0].error}")
    return ends[0] if ends else ""


def _run(ranks: SimulatedRanks, task: Task, size: int) -> tuple[JobResult, list[Program]]:
    programs: list[Program] = []
    job = Job("tpcheck.execution:execute_recorded", (task, programs), size, _TIMEOUT_S)
    (result,) = ranks.run([job])
    return result, sorted(programs, key=lambda program: program.rank)


def _differ(actual: torch.Tensor, expected: torch.Tensor, most: float) -> bool:
    if actual.shape != expected.shape:
        return True
    actual, expected = actual.double(), expected.double()
    if torch.equal(actual.isnan(), expected.isnan()):
        actual, expected = actual.nan_to_num(), expected.nan_to_num()
    error = (actual - expected).norm()
    return not bool(error <= most * expected.norm())


def _candidates(
    taken: _Taken, task: Task, tp_size: int, name: str, fqn: str
) -> Iterator[Callable[[], _Written]]:
    """Yield the ways to write what was taken, those that need no guess first.

    All of it; a module whose placements are declared; the end of it, from what still agrees; a
    module whose placements are guessed; what leads to the first collective that differs.
    """
    title = name + _SHOWN[taken.output]
    whole = whole_view(title, taken.programs, taken.output, task.inputs)
    makers: list[Callable[[], View]] = [lambda: whole]
    full = whole_view(title, taken.programs, taken.output, task.inputs, everything=True)
    declared: list[Callable[[], View]] = []
    guessed: list[Callable[[], View]] = []
    known = [program.modules for program in taken.programs]
    order = [module for module in known[0] if all(module in modules for modules in known)]
    for module in sorted(order[:_MODULES_TRIED], key=lambda module: module != fqn):
        told = known[0][module].in_placement is not None
        place = f"{name}, {module}"
        (declared if told else guessed).append(
            partial(module_view, place, taken.programs, module, task.inputs)
        )
    if not taken.output:
        declared, guessed = [], []
    cuts: list[Callable[[], View]] = [
        partial(cut_view, full, pieces=pieces) for pieces in (False, True)
    ]
    meetings = differing_meetings(full) if taken.output else []
    for meeting in meetings:
        guessed += [partial(cut_view, full, pieces=p, target=meeting) for p in (False, True)]
    for make in (*makers, *declared, *cuts, *guessed):
        for exact in (True, False):
            yield partial(_lines, make, task, tp_size, exact)


def _lines(make: Callable[[], View], task: Task, tp_size: int, exact: bool) -> _Written:
    """Return a view's script, with statements packed onto lines only where they must be."""
    view = make()
    keys = sorted({slot.any.arguments for slot in view.slots if slot.any.function == INPUT})
    weights = [str(s.any.arguments[0]) for s in view.slots if s.any.function == WEIGHT]
    names = {key: view.inputs[key][0] for key in keys}
    short = {} if exact else _short_names(weights)
    parts: tuple[list[str], list[str]] = ([], [])
    for packed, longest in _LAYOUTS:
        writer = Writer(view.slots, view.roots, view.places, short, names, longest=longest)
        parts = recorded_script(
            title=view.title,
            inputs=[line for key in keys for line in wrapped(" = ".join(view.inputs[key]))],
            body=laid_out(writer.statements(), packed=packed),
            tp_size=tp_size,
            seed=task.seed,
            weight_dtype=task.weight_dtype,
            dtype=task.dtype,
            exact=exact,
            copies=view.writes,
            compared=view.places[0][0] == 1,
            shapes=view.shapes_differ,
        )
        if len(parts[0]) + len(parts[1]) <= MAX_LINES:
            break
    return (*parts, view, exact)


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Return the shortest endings, by parts, that tell the names apart."""
    bare = {name: name.removesuffix(".weight").split(".") for name in names}
    short: dict[str, str] = {}
    for name, parts in bare.items():
        for count in range(1, len(parts) + 1):
            ending = parts[-count:]
            if sum(other[-count:] == ending for other in bare.values()) == 1:
                break
        short[name] = ".".join(ending)
    return short
