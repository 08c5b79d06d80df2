"""diff(expected, actual) -> Report: the loop over tensors.

Requirement: tensors come in the user's order, each is read, judged and let go before the next, and
a tensor that cannot be compared never hides the others. The first that differs is the report's
first divergence: what follows it may follow from it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpcheck.captures.judging import Task, derived_limit, judge_tensor
from tpcheck.captures.order import compile_pattern, in_order, read_order
from tpcheck.captures.reading import MAX_RANKS, Capture, Problem, Source, read_capture
from tpcheck.captures.rules import first_match, unused
from tpcheck.captures.shard_map import ShardRule, read_shard_map
from tpcheck.captures.tolerances import (
    EQUAL_BITS,
    Limit,
    ToleranceRule,
    given_limit,
    read_tolerances,
    unreachable,
)
from tpcheck.captures.verdicts import NOTHING, problem_verdict
from tpcheck.environment import collect, tpcheck_version, utc_now
from tpcheck.errors import TPCheckError
from tpcheck.progress import Progress
from tpcheck.records import PASS, Check, Report, Verdict
from tpcheck.records import Path as Carrier

Rules = str | Path | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user said, read and held against the captures. `rank_by_rank`: both sides are."""

    expected: Capture
    actual: Capture
    oracle: Capture | None
    shards: tuple[ShardRule, ...]
    tolerances: tuple[ToleranceRule, ...]
    limit: Limit
    repro: str
    rank_by_rank: bool

    @property
    def tp_size(self) -> int:
        """How many ranks recorded, or should have."""
        return len(self.actual.ranks)

    @property
    def recorded_order(self) -> tuple[str, ...]:
        """The order that a recorder wrote down, if one did."""
        return self.expected.order or self.actual.order


def diff(
    expected: Source | Sequence[Source],
    actual: Source | Sequence[Source],
    *,
    shard_map: Rules | None = None,
    tolerance: Rules | None = None,
    order: str | Path | Sequence[str] | None = None,
    oracle: Source | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    tp_size: int | None = None,
    rank_pattern: str | None = None,
    on_tensor: Callable[[Verdict], None] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two captures that anything may have recorded.

    Args:
        expected: what TP=1 recorded: a safetensors file, a folder of them, or tensors by name. If
            it was recorded per rank, it is compared rank by rank, at the same degree.
        actual: what TP=N recorded: the same, or a folder with files or folders per rank, or a list
            with one of these per rank, in rank order.
        shard_map: how ranks' tensors make up the logical ones: a TOML file, or a dict like it
            (captures/shard_map.py). Without it sizes decide, and the choice is reported.
        tolerance: how far which tensor may be off: a TOML file or a dict (captures/tolerances.py).
        order: a file, or a list, of names and patterns; default: the order that the recorder wrote
            into the files' metadata, else that in which decoders run, as far as names tell it.
        oracle: TP=1 in a wider dtype: tolerances are derived from TP=1's own error against it.
        atol: absolute tolerance of every tensor; not together with `tolerance` or `oracle`.
        rtol: relative tolerance of every tensor.
        tp_size: how many ranks should have recorded `actual`.
        rank_pattern: a regular expression whose one group is the rank in a file's path; `none`
            reads all files as one rank's.
        on_tensor: called with each verdict as soon as it is known.
        progress: called with (done, total, text) after each tensor.

    Returns:
        One verdict per tensor, `case_id` its name, and one per file that cannot be read. `backend`
        is "capture", which counts for no backend at a gate.

    Raises:
        TPCheckError: a path holds no safetensors, a rule file is malformed, or options contradict.

    Example:
        >>> import torch
        >>> one, two = torch.arange(4.0), torch.arange(4.0)
        >>> diff({"x": one}, [{"x": two[:2]}, {"x": two[2:]}]).outcome
        'PASS'
    """
    given = given_limit(atol, rtol)
    options = {
        "--shard-map": shard_map,
        "--tolerance": tolerance,
        "--order": order,
        "--oracle": oracle,
        "--atol": atol,
        "--rtol": rtol,
        "--tp": tp_size,
        "--rank-pattern": rank_pattern,
    }
    said = [name for name, value in options.items() if value is not None]
    limits = [name for name in ("--tolerance", "--oracle", "--atol", "--rtol") if name in said]
    if len(limits) > 1 and limits != ["--atol", "--rtol"]:
        raise TPCheckError(f"{limits[0]} and {limits[1]} cannot be combined: which one counts?")
    captures = _captures(expected, actual, oracle, tp_size, rank_pattern)
    settings = Settings(
        *captures,
        shards=() if shard_map is None else read_shard_map(shard_map),
        tolerances=() if tolerance is None else read_tolerances(tolerance),
        limit=given or EQUAL_BITS,
        repro=_repro(expected, actual, options),
        rank_by_rank=len(captures[0].ranks) > 1,
    )
    if settings.rank_by_rank and settings.shards:
        raise TPCheckError(
            "--shard-map means nothing here: EXPECTED was recorded per rank, and ranks are compared"
            " one by one"
        )
    names, notes = _names(settings, order)
    verdicts = []
    for number, one in enumerate(_judged(settings, names), 1):
        verdicts.append(one)
        if on_tensor is not None:
            on_tensor(one)
        if progress is not None:
            progress(number, max(len(names), number), one.case_id)
    verdicts += _nothing_compared(settings, verdicts)
    notes += [*_rule_notes(settings, names), *_passed_notes(settings, verdicts)]
    notes += _order_notes(settings, verdicts) if order is None else []
    return Report(
        subject=f"{settings.expected.name} against {settings.actual.name}",
        verdicts=tuple(verdicts),
        environment=collect(backend="capture"),
        path=Carrier("capture", {}, False, ("recorded files: nothing was run",)),
        tpcheck=tpcheck_version(),
        notes=tuple(notes),
        created=utc_now(),
    )


def exit_code(report: Report) -> int:
    """Return 0 where both captures agree in everything, 1 on any finding."""
    return 0 if report.outcome == PASS else 1


def _captures(
    expected: Source | Sequence[Source],
    actual: Source | Sequence[Source],
    oracle: Source | None,
    tp_size: int | None,
    rank_pattern: str | None,
) -> tuple[Capture, Capture, Capture | None]:
    if tp_size is not None and tp_size < 1:
        raise TPCheckError(f"tp_size={tp_size}, but should be at least 1")
    if tp_size is not None and tp_size > MAX_RANKS:
        raise TPCheckError(f"tp_size={tp_size}, but should be at most {MAX_RANKS}")
    one = read_capture(expected, rank_pattern=rank_pattern)
    other = read_capture(actual, rank_pattern=rank_pattern, tp_size=tp_size)
    if tp_size is not None and len(other.ranks) != tp_size:
        text = f"ranks that recorded: {len(other.ranks)}, but should be --tp {tp_size}"
        other = replace(other, problems=(*other.problems, Problem(other.name, None, text)))
    third = None if oracle is None else read_capture(oracle, rank_pattern=rank_pattern)
    if third is not None and len(third.ranks) > 1:
        raise TPCheckError(f"{third.name}: {len(third.ranks)} ranks recorded, but should be TP=1")
    if len(one.ranks) > 1 and len(one.ranks) != len(other.ranks):
        also = f", or {len(other.ranks)} as in {other.name}" if len(other.ranks) > 1 else ""
        raise TPCheckError(
            f"{one.name}: {len(one.ranks)} ranks recorded, but should be 1{also}: record EXPECTED"
            " at TP=1"
        )
    return one, other, third


def _names(
    settings: Settings, order: str | Path | Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return every tensor's name in the order of comparison, and what is odd about that order."""
    names = settings.expected.names | settings.actual.names
    notes = [*settings.expected.notes, *settings.actual.notes]
    if order is None:
        return in_order(names, settings.recorded_order, patterns=False)[0], notes
    if isinstance(order, str | Path):
        lines = read_order(order)
    else:
        lines = tuple(order)
        for i, line in enumerate(lines):
            compile_pattern(line, f"order[{i}]")
    found, idle = in_order(names, lines)
    return found, notes + [f"order: {line!r} is the name of no tensor" for line in idle]


def _judged(settings: Settings, names: Sequence[str]) -> Iterator[Verdict]:
    """Judge everything; only what differs first keeps its divergence."""
    found_first = False
    for one in _verdicts(settings, names):
        yield replace(one, first_divergence=None) if found_first else one
        found_first = found_first or one.first_divergence is not None


def _nothing_compared(settings: Settings, verdicts: Sequence[Verdict]) -> list[Verdict]:
    failed = any(one.outcome != PASS for one in verdicts)
    if failed or any(one.checks["allclose"].facts.get("finite") for one in verdicts):
        return []
    return [
        problem_verdict("(everything)", settings.tp_size, NOTHING, repro="", outcome="INCONCLUSIVE")
    ]


def _verdicts(settings: Settings, names: Sequence[str]) -> Iterator[Verdict]:
    """Judge files that cannot be read, then every tensor."""
    unread = {"EXPECTED": settings.expected, "ACTUAL": settings.actual}
    if settings.oracle is not None:
        unread["ORACLE"] = settings.oracle
    for side, capture in unread.items():
        by_file: dict[str, list[str]] = {}
        for one in capture.problems:
            if not one.tensor:
                who = "" if one.rank is None else f"rank {one.rank}: "
                by_file.setdefault(one.where, []).append(f"{who}{one.text}")
        for where, texts in by_file.items():
            yield problem_verdict(
                f"{side} {where}", settings.tp_size, "\n".join(texts), repro=settings.repro
            )
    for name in names:
        if not settings.rank_by_rank:
            ranks = range(settings.tp_size)
            found = _verdict(settings, name, name, settings.expected.ranks[0], ranks)
            yield from [found] if found else []
            continue
        for rank in range(settings.tp_size):
            shown = f"{name} [rank {rank}]"
            found = _verdict(settings, name, shown, settings.expected.ranks[rank], (rank,))
            yield from [found] if found else []


def _verdict(
    settings: Settings,
    name: str,
    shown: str,
    expected: Mapping[str, Any],
    ranks: Sequence[int],
) -> Verdict | None:
    """Judge one tensor; None where nobody can say that anything is wrong with it."""
    held = [settings.actual.ranks[rank] for rank in ranks]
    locals_ = {rank: one[name] for rank, one in zip(ranks, held, strict=True) if name in one}
    size, repro = settings.tp_size, settings.repro
    problems = tuple(
        f"{one.text}"
        for capture in (settings.expected, settings.actual)
        for one in capture.problems
        if one.tensor == name
    )
    if name not in expected:
        if not locals_ or any(not one.tensor for one in settings.expected.problems):
            return None  # it may stand in the file that cannot be read
        dtype = next(iter(locals_.values())).dtype
        text = "extra: ACTUAL holds it, EXPECTED does not"
        return problem_verdict(shown, size, text, repro=repro, dtype=dtype, outcome="WRONG")
    tensor = expected[name]
    if not locals_:
        text = "missing: EXPECTED holds it, ACTUAL does not"
        reason = "\n".join([text, *problems])
        return problem_verdict(
            shown, size, reason, repro=repro, dtype=tensor.dtype, outcome="WRONG"
        )
    rule = first_match(settings.shards, name)
    tolerance = first_match(settings.tolerances, name)
    try:
        limit = tolerance.limit if tolerance is not None else settings.limit
        if settings.oracle is not None:
            oracle = settings.oracle.ranks[0].get(name)
            limit = derived_limit(tensor, oracle, size)
        return judge_tensor(Task(shown, tensor, locals_, ranks, rule, limit, size, repro, problems))
    except TPCheckError as error:
        return problem_verdict(shown, size, str(error), repro=repro, dtype=tensor.dtype)


def _rule_notes(settings: Settings, names: Sequence[str]) -> list[str]:
    notes = unused(settings.shards, [first_match(settings.shards, name) for name in names])
    if settings.tolerances:
        late = unreachable(settings.tolerances)
        used = [first_match(settings.tolerances, name) for name in names]
        idle = unused(settings.tolerances, used)
        known = {text.partition(" (")[0] for text in late}
        notes += [*late, *(text for text in idle if text.partition(" (")[0] not in known)]
    return notes


def _passed_notes(settings: Settings, verdicts: Sequence[Verdict]) -> list[str]:
    """Say what passed and may still not be what its recorder meant."""
    same = sorted(_files(settings.expected) & _files(settings.actual))
    passed = [one for one in verdicts if one.outcome == PASS]
    sums = [
        one.case_id
        for one in passed
        if one.checks.get("tiling", _NO_CHECK).facts.get("layout_source") == "chosen by values"
    ]
    facts = {one.case_id: one.checks["allclose"].facts for one in passed}
    empty = [name for name, one in facts.items() if one.get("count") and not one.get("finite")]
    notes = [f"{same[0]} is on both sides: it was compared with itself"] if same else []
    if sums:
        notes.append(
            f"{_listed(sums)}: passed as terms of a sum, because their values add up; where each"
            " rank should hold the sum, an all-reduce is missing: say replicated in a shard map"
        )
    if empty:
        notes.append(f"{_listed(empty)}: no element is finite, on either side")
    return notes


def _order_notes(settings: Settings, verdicts: Sequence[Verdict]) -> list[str]:
    """Say where the first of several that differ is known by its name alone."""
    off = sum(one.outcome != PASS for one in verdicts)
    if off < 2 or settings.recorded_order:
        return []
    return [
        "no file says in which order tensors were made: they stand as a decoder's names run, and"
        " the first that differs is the first of those; --order says it otherwise"
    ]


_NO_CHECK = Check(PASS)


def _files(capture: Capture) -> set[str]:
    held = {one.where for rank in capture.ranks for one in rank.values()}
    return {os.path.realpath(one) for one in held if os.path.isfile(one)}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _repro(
    expected: Source | Sequence[Source],
    actual: Source | Sequence[Source],
    options: Mapping[str, Any],
) -> str:
    """Return the command that repeats this; nothing where tensors came from memory."""
    given = {name: value for name, value in options.items() if value is not None}
    plain = (str, Path, int, float)
    if not all(isinstance(one, plain) for one in (expected, actual, *given.values())):
        return ""
    words = [str(expected), str(actual)]
    words += [word for name, value in given.items() for word in (name, str(value))]
    return f"tpcheck diff {shlex.join(words)}"
