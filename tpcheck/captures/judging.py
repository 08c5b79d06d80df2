"""One tensor of two captures, from headers to a verdict.

Requirement: everything that can be said of a tensor is said at once: wrong dtype and wrong values,
copies that differ and a piece in the wrong place. Where geometry or dtype rule a comparison out,
the checks that need it are skipped, and say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tpcheck.captures.attribution import disagreements, foreign_pieces, wrong_term
from tpcheck.captures.layouts import Layout, Settled, Shape, settle, whole_tensors
from tpcheck.captures.measuring import BLOCK, Tally, measure, measure_sum, merged
from tpcheck.captures.shard_map import ShardRule
from tpcheck.captures.tensors import Tensor, byte_count, has_rounding, is_packed, numel
from tpcheck.captures.tolerances import EQUAL_BITS, INTEGERS, Limit, from_tolerance
from tpcheck.captures.verdicts import NOTHING, allclose_check, verdict
from tpcheck.comparison import pooled_rms
from tpcheck.numerics.drift import expected_ratio, floored, ratio_limit
from tpcheck.numerics.tolerance import derived_tolerance
from tpcheck.numerics.ulp import eps
from tpcheck.records import FAIL, PASS, SKIPPED, Check, FirstDivergence, Verdict

_CLEARER = 2.0
"""Undeclared tensors of which none is right by itself are terms of a sum where that is so many
times closer than the best of them, copies where it is so many times further off, and else a tie:
copies add up to several times the tensor, terms are off by what the others hold."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor to judge. `locals_`: by rank; `ranks`: all that may hold it."""

    name: str
    expected: Tensor
    locals_: Mapping[int, Tensor]
    ranks: Sequence[int]
    rule: ShardRule | None
    limit: Limit
    tp_size: int
    repro: str
    problems: tuple[str, ...] = ()


class Measured(NamedTuple):
    """What reading the values came to. `tie`: why copies and terms of a sum are not told apart."""

    layout: Layout
    tallies: Mapping[int, Tally]
    total: Tally
    tie: str = ""


class _Bytes(NamedTuple):
    """A tensor of elements narrower than a byte, as its bytes."""

    tensor: Tensor
    dtype: str = "uint8"

    @property
    def shape(self) -> Shape:
        return (byte_count(self.tensor),)

    @property
    def where(self) -> str:
        return self.tensor.where

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.tensor.read(start, stop)


def judge_tensor(task: Task) -> Verdict:
    """Return the verdict of one tensor that both sides recorded.

    Raises:
        TPCheckError: a file cannot be read to its end.
    """
    task, problems = _comparable(task)
    shapes = {rank: one.shape for rank, one in task.locals_.items()}
    settled = settle(task.rule, task.expected.shape, shapes, task.ranks)
    of_dtype, comparable = _dtype_problems(task)
    problems += of_dtype
    found = _measured(task, settled.layout) if settled.layout and comparable else None
    checks = {"capture": _capture(problems, task, settled)}
    if len(task.ranks) > 1:
        checks["tiling"] = _tiling(task, settled, found)
    tie = found is not None and bool(found.tie)
    outcomes = {"tiling": "INCONCLUSIVE" if tie and not settled.problems else "WRONG"}
    rank = settled.rank
    first = None
    if found is None or tie:
        checks["allclose"] = Check(SKIPPED, NOTHING)
    else:
        if found.layout.kind != "partial-sum" and len(found.layout.ranks) > 1:
            checks |= _agreement(task, found)
        checks["allclose"], blamed, detail = _allclose(task, found)
        outcomes["allclose"] = _outcome(task, found)
        rank = blamed if blamed is not None else rank
        first = _divergence(task, found, rank, detail)
    if first is None:
        first = FirstDivergence(task.name, rank)
    return verdict(
        task.name,
        task.tp_size,
        task.expected.dtype,
        checks,
        outcomes=outcomes,
        repro=task.repro,
        first=first if any(check.outcome == FAIL for check in checks.values()) else None,
    )


def derived_limit(expected: Tensor, oracle: Tensor | None, tp_size: int) -> Limit:
    """Return what TP=1's own error against an oracle allows TP=N to be off.

    Source: numerics/tolerance.derived_tolerance, with the law of a ring of `tp_size` ranks.
    """
    if not has_rounding(expected.dtype):
        return INTEGERS
    if oracle is None or oracle.shape != expected.shape or oracle.dtype.startswith("complex"):
        return replace(EQUAL_BITS, source="the oracle has no such tensor of this shape")
    error, size, count = pooled_rms(_pairs(expected, oracle))
    error = floored(error, size, eps(expected.dtype))
    return from_tolerance(derived_tolerance(error, ratio_limit(expected_ratio(tp_size)), count))


def _pairs(one: Tensor, other: Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, numel(one), BLOCK):
        stop = min(start + BLOCK, numel(one))
        yield one.read(start, stop), other.read(start, stop)


def _comparable(task: Task) -> tuple[Task, list[str]]:
    """Put bytes in the place of elements that torch cannot hold; they can be copies only."""
    problems = list(task.problems)
    sides = [task.expected, *task.locals_.values()]
    if not all(is_packed(one) for one in sides):
        return task, problems
    shapes = {one.shape for one in sides}
    if len(shapes) == 1 and len({one.dtype for one in sides}) == 1:
        locals_ = {rank: _Bytes(one) for rank, one in task.locals_.items()}
        return replace(task, expected=_Bytes(task.expected), locals_=locals_), problems
    return task, problems


def _dtype_problems(task: Task) -> tuple[list[str], bool]:
    """Return what is wrong with dtypes, and whether values can be compared all the same."""
    wanted = task.expected.dtype
    odd = {rank: one.dtype for rank, one in task.locals_.items() if one.dtype != wanted}
    sides = [task.expected, *task.locals_.values()]
    kinds = {(is_packed(one), one.dtype.startswith("complex")) for one in sides}
    if any(packed for packed, _ in kinds):
        return [
            f"{wanted} has elements narrower than a byte: whole copies are compared only"
        ], False
    if not odd or (task.limit.other_dtype and len(kinds) == 1):
        return [], True
    groups: dict[str, list[int]] = {}
    for rank, dtype in odd.items():
        groups.setdefault(dtype, []).append(rank)
    said = [
        f"dtype={dtype}{_of_ranks(ranks, task)}, but should be {wanted}"
        for dtype, ranks in groups.items()
    ]
    way_out = "; where that is meant, say other_dtype = true in the tolerance file"
    return [said[0] + way_out, *said[1:]], len(kinds) == 1


def _measured(task: Task, layout: Layout) -> Measured:
    limit = _limit(task)
    if layout.kind == "partial-sum":
        total = measure_sum(task.expected, task.locals_, layout, limit)
        return Measured(layout, {}, total)
    tallies = measure(task.expected, task.locals_, layout, limit)
    total = merged(tallies.values())
    undeclared = layout.kind == "replicated" and not layout.said and len(layout.ranks) > 1
    if undeclared and all(one.mismatches for one in tallies.values()):
        ranks = layout.ranks
        if ranks == tuple(task.ranks) and disagreements(layout, task.locals_):
            terms = whole_tensors(layout.shape, ranks, "partial-sum")
            sums = measure_sum(task.expected, task.locals_, terms, limit)
            best = min(_relative(one) for one in tallies.values())
            closer = _relative(sums)
            if closer * _CLEARER <= best and sums.masks <= total.masks:
                return Measured(terms, {}, sums)
            if closer < best * _CLEARER:
                tie = (
                    f"ambiguous: copies that differ, or terms of a sum? The best of them is off by"
                    f" relative rms {best:.2g}, their sum by {closer:.2g}; say which in a shard map"
                )
                return Measured(layout, {}, total, tie)
    return Measured(layout, tallies, total)


def _limit(task: Task) -> Limit:
    dtypes = {task.expected.dtype, *(one.dtype for one in task.locals_.values())}
    return INTEGERS if not any(map(has_rounding, dtypes)) and len(dtypes) == 1 else task.limit


def _capture(problems: Sequence[str], task: Task, settled: Settled) -> Check:
    # with one rank there is nothing to tile: a wrong shape is a wrong tensor
    problems = [*problems, *(settled.problems if len(task.ranks) == 1 else ())]
    facts = {"shape": list(task.expected.shape)}
    if not problems:
        return Check(PASS, "", facts)
    alone = "rank 0: " if len(task.ranks) == 1 else ""
    return Check(FAIL, "\n".join(one.removeprefix(alone) for one in problems), facts)


def _tiling(task: Task, settled: Settled, found: Measured | None) -> Check:
    layout = found.layout if found else settled.layout
    facts: dict[str, Any] = {}
    if layout is not None and not (found and found.tie):
        said = task.rule.where if task.rule is not None else "chosen by sizes"
        if task.rule is None and layout.kind == "partial-sum":
            said = "chosen by values"
        facts = {"layout": layout.text, "layout_source": said}
    problems = [*settled.problems, *([found.tie] if found and found.tie else ())]
    return Check(FAIL, "\n".join(problems), facts) if problems else Check(PASS, "", facts)


def _agreement(task: Task, found: Measured) -> dict[str, Check]:
    layout, locals_ = found.layout, task.locals_
    places = {(span.whole, span.length) for span in layout.spans}
    if len(places) == len(layout.spans) or len({one.dtype for one in locals_.values()}) > 1:
        return {}
    odd = disagreements(layout, locals_, _off_ranks(found))
    if not odd:
        return {"rank_agreement": Check(PASS)}
    lines = [
        f"rank {one.rank}: {_elements(one.elements)} other bits than on rank {one.majority}"
        for one in odd[:3]
    ]
    lines += [f"... and {len(odd) - 3} more ranks"] if len(odd) > 3 else []
    facts = {"ranks": [one.rank for one in odd]}
    return {"rank_agreement": Check(FAIL, "\n".join(lines), facts)}


def _allclose(task: Task, found: Measured) -> tuple[Check, int | None, str]:
    """Return the check, the rank to blame if one can be told, and what it seems to have done."""
    limit = found.total.limit
    copies = found.layout.kind == "replicated"
    off = _off_ranks(found)
    worst = max((_relative(one) for one in found.tallies.values()), default=0.0)
    relative_rms = worst if copies and found.tallies else _relative(found.total)
    too_far = limit.relative_rms is not None and relative_rms > limit.relative_rms
    rank, detail = None, ""
    if found.total.mismatches or too_far:
        if off and len(off) < len(found.tallies):
            rank = max(off, key=lambda one: found.tallies[one].square_error)
        rank, detail = _explained(task, found, off, rank)
    blame = _of_ranks(off, task) if off else ""
    blame += f"; {detail}" if detail else ""
    facts = {"layout": found.layout.text, "ranks": off, "blamed_rank": rank, "detail": detail}
    if found.total.limit.partial_bound and found.layout.kind == "partial-sum":
        limit = replace(limit, bits=False, atol=None, source=_SUM_SOURCE)
    if numel(task.expected) == 0:
        return Check(PASS, "", {"count": 0, **facts}), None, ""
    check = allclose_check(
        found.total.freeze(),
        limit,
        integers=limit is INTEGERS,
        relative_rms=relative_rms,
        blame=blame,
        facts=facts,
    )
    return check, rank, detail


_SUM_SOURCE = "(ranks + 1) u sum|term|, Higham 2002 section 4.2"


def _explained(
    task: Task, found: Measured, off: Sequence[int], rank: int | None
) -> tuple[int | None, str]:
    if found.layout.kind == "partial-sum":
        return wrong_term(found.layout, task.expected, task.locals_) or (None, "")
    if found.layout.kind == "replicated" or not off:
        return rank, ""
    limit = found.total.limit
    moved = foreign_pieces(found.layout, task.expected, task.locals_, limit, off)
    said = [f"rank {one} holds rank {owner}'s piece" for one, owner in list(moved.items())[:4]]
    rank = min(moved) if rank is None and moved else rank
    return rank, ", ".join(said)


def _outcome(task: Task, found: Measured) -> str:
    exact = found.total.limit is INTEGERS
    return "WRONG" if exact or found.total.masks else "DRIFT"


def _divergence(
    task: Task, found: Measured, rank: int | None, detail: str
) -> FirstDivergence | None:
    one = found.total.freeze()
    if not one.comparison.mismatches:
        return None
    known = not one.comparison.mask_mismatches and math.isfinite(one.comparison.worst_ulp)
    ulp = one.comparison.worst_ulp if known else None
    return FirstDivergence(task.name, rank, one.region, ulp, detail)


def _off_ranks(found: Measured) -> list[int]:
    return [rank for rank, one in found.tallies.items() if _is_off(one, found.total.limit)]


def _elements(count: int) -> str:
    return f"{count} element{'s have' if count > 1 else ' has'}"


def _is_off(tally: Tally, limit: Limit) -> bool:
    too_far = limit.relative_rms is not None and _relative(tally) > limit.relative_rms
    return bool(tally.mismatches) or too_far


def _relative(tally: Tally) -> float:
    return tally.freeze().comparison.relative_rms


def _of_ranks(ranks: Sequence[int], task: Task) -> str:
    if len(task.ranks) == 1 and task.ranks[0] == 0:
        return ""
    if len(ranks) == len(task.locals_) and len(ranks) > 1:
        return f" on all {len(ranks)} ranks"
    shown = ", ".join(map(str, ranks[:4])) + (", ..." if len(ranks) > 4 else "")
    return f" on rank{'s' if len(ranks) > 1 else ''} {shown}"
