"""locate(...) -> FirstDivergence: the first traced module that leaves its reference.

Requirement: a failing verdict names a module, a rank and an index range, not a logit. Modules are
taken in the order in which they returned, so an inner module is blamed before the one around it.
Where placements are declared the module is judged on the reference's own input (a replay), so an
upstream error is not blamed on what follows; elsewhere an input that is off already is told, since
code between modules can be at fault. Where there are no modules, collectives stand in for them. At
a row-parallel layer the regression onto the captured partials names the rank and the factor.
Placements that nobody declared: [Undeclared Placements].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.comparison import as_float64, compare, describe_region, mask_difference
from tpcheck.numerics.regression import most_scaled_rank
from tpcheck.observation.modules import PointRecord
from tpcheck.placement import Partial, Placement, Replicate, Slices
from tpcheck.reconciliation import (
    displaced,
    infer,
    reconciled,
    relative_rms,
    rms,
    unpadded,
    widened,
    without_pads,
)
from tpcheck.records import BEFORE_IT, FirstDivergence
from tpcheck.trace import Trace

Points = Mapping[str, PointRecord]

_DEPENDENT = 1e-9
"""Where terms differ by no more, six digits of a factor are float64's own rounding over it."""


def locate(
    reference: Trace,
    traces: Sequence[Trace],
    *,
    limit: float,
    base: Trace | None = None,
    ratio_limit: float = 0.0,
) -> FirstDivergence | None:
    """Return the first module whose output the limits do not explain, or None.

    Args:
        reference: TP=1 in the oracle's dtype, with points.
        traces: TP=N, rank order, with points and (where placements are declared) replays.
        limit: largest relative rms a module's output may be off.
        base: TP=1 in the dtype of `traces`; then a module may be off `ratio_limit` times as far
            as it is there, whatever `limit` says.
        ratio_limit: see `base`.
    """
    points = _points(reference)
    before = ""
    for fqn in sorted(points, key=lambda name: points[name].finished):
        want = points[fqn].output
        if want is None:
            continue
        allowed = limit
        if base is not None and fqn in _points(base):
            allowed = max(limit, ratio_limit * relative_rms(_points(base)[fqn].output, want))
        if all(fqn in _points(trace) for trace in traces):
            found = _judge_point(fqn, points[fqn], traces, allowed, exact=base is None)
        else:
            found = _judge_holders(fqn, points[fqn], traces, allowed)
        if found is not None:
            remark = _remark_on(before, points, traces, allowed) if found.index else ""
            return replace(found, detail="; ".join(filter(None, [found.detail, remark])))
        before = fqn
    return None


def _remark_on(fqn: str, points: Points, traces: Sequence[Trace], allowed: float) -> str:
    """Say of the module that returned last before the first divergence what nothing else tells.

    Partial sums are no fault of the module that gives them, nor is a shape that cannot be read as
    TP=1's; what takes them as they are is only where it shows.
    """
    want = points[fqn].output if fqn else None
    records = [_points(trace)[fqn] for trace in traces if fqn in _points(trace)]
    outputs = [record.output for record in records if record.output is not None]
    if want is None or len(outputs) != len(traces):
        return ""
    if all(output.numel() != want.numel() or output.ndim != want.ndim for output in outputs):
        if infer(outputs, want, allowed) is None:
            shapes = f"{list(outputs[0].shape)}, and {list(want.shape)} at TP=1"
            return f"{fqn}, before it, gives shape={shapes}"
        return ""
    placements = infer(outputs, want, allowed)
    if placements is None or not isinstance(placements[0], Partial):
        return ""
    summed = [partial for record in _points(traces[0]).values() for partial in record.partials]
    summed += traces[0].extras.get("outside", ())
    if any(torch.equal(operand, outputs[0]) for _, operand, _ in summed):
        return ""
    return f"{fqn}, before it, gives partial sums that no all-reduce adds up"


def _judge_point(
    fqn: str, reference: PointRecord, traces: Sequence[Trace], allowed: float, *, exact: bool
) -> FirstDivergence | None:
    want = reference.output
    assert want is not None
    replayed = all(fqn in trace.extras.get("replayed", {}) for trace in traces)
    points: list[Any] = [t.extras["replayed"] if replayed else _points(t) for t in traces]
    records = [own[fqn] for own in points]
    outputs = [record.output for record in records]
    if any(output is None for output in outputs):
        return _judge_holders(fqn, reference, traces, allowed)
    declared = [record.out_placement for record in records]
    placements = declared if declared[0] is not None else infer(outputs, want, allowed)
    if placements is None:
        return None
    held, placements = without_pads(outputs, placements, want)
    rank, got = reconciled(held, placements, want, allowed)
    if got is None or relative_rms(got, want) <= allowed:
        return None
    if got.shape != want.shape:
        detail = f"shape={list(got.shape)}, but should be {list(want.shape)} as at TP=1"
        return FirstDivergence(fqn, rank, detail=detail)
    worst = compare(got, want, dtype=outputs[0].dtype)
    notes = [f"relative rms {worst.relative_rms:.3g}"]
    notes += ["on the reference's own input"] if replayed else []
    if declared[0] is None:
        notes.append(_reading(placements))
    blamed, text = (None, "") if replayed else _blame_for_input(records, reference, allowed)
    if not text and exact:  # rounding makes few tokens of a channel look like another's
        text = displaced(held, placements, want, allowed)
    if not text:
        attribute = _attribution if exact else _regression
        blamed, text = attribute(records, reference, placements[0], got, allowed)
    notes += [text] if text else []
    if reference.exchanged or _is_dealt_out(records, reference, allowed):
        rank = None  # who holds what is off is not who gave it
    return FirstDivergence(
        fqn=fqn,
        rank=blamed if blamed is not None else rank,
        index=_place(got, want, allowed),
        ulp=worst.worst_ulp,
        detail="; ".join(notes),
    )


def _judge_holders(
    fqn: str, reference: PointRecord, traces: Sequence[Trace], allowed: float
) -> FirstDivergence | None:
    """Judge a module that some ranks have, as an expert: given the same, it has to give the same.

    So it is with what one rank alone returns, as the logits of an engine that gathers them.

    Given something else, or a piece of it, there is nothing to hold it against.
    """
    want = reference.output
    assert want is not None
    for trace in traces:
        own = _points(trace).get(fqn)
        if own is None or own.input is None or own.output is None or own.output.shape != want.shape:
            continue
        if (
            relative_rms(own.input, reference.input) > allowed
            or relative_rms(own.output, want) <= allowed
        ):
            continue
        worst = compare(own.output, want, dtype=own.output.dtype)
        return FirstDivergence(
            fqn=fqn,
            rank=trace.rank,
            index=_place(own.output, want, allowed),
            ulp=worst.worst_ulp,
            detail=f"relative rms {worst.relative_rms:.3g}; on the same input",
        )
    return None


def _place(got: torch.Tensor, want: torch.Tensor, allowed: float) -> str:
    size = rms(torch.where(want.isfinite(), want, 0.0))
    bad = (widened(got) - widened(want)).abs() > max(allowed, 1e-15) * size
    return describe_region(bad | mask_difference(got, want))


def _reading(placements: Sequence[Placement]) -> str:
    kind = placements[0]
    if isinstance(kind, Partial):
        return f"read as {kind}, since the ranks differ and none is right"
    if not isinstance(kind, Slices):
        return f"read as {kind}"
    several = len(kind.pieces) > 1
    return f"read as {'parts, each cut in rank order' if several else 'padded shards'}"


def _blame_for_input(
    records: Sequence[PointRecord], reference: PointRecord, allowed: float
) -> tuple[int | None, str]:
    """Say whether what went in is off as well: then the code before the module is at fault."""
    inputs = [record.input for record in records if record.input is not None]
    want = reference.input
    if want is None or len(inputs) != len(records):
        return None, ""
    placements = infer(inputs, want, allowed)
    if placements is None:
        return None, ""
    held, placements = without_pads(inputs, placements, want)
    rank, got = reconciled(held, placements, want, allowed)
    if got is None:
        return None, ""
    if relative_rms(got, want) <= allowed:
        partial = isinstance(placements[0], Partial)
        return None, f"{BEFORE_IT} partial sums, not reduced over ranks" if partial else ""
    where = "" if rank is None else f" on rank {rank}"
    return rank, f"{BEFORE_IT} off already{where}: look at what comes before it"


def _attribution(
    records: Sequence[PointRecord],
    reference: PointRecord,
    placement: Placement,
    got: torch.Tensor,
    allowed: float,
) -> tuple[int | None, str]:
    """Regress onto the captured partials: which rank's term is missing, foreign or scaled."""
    want = reference.output
    assert want is not None
    outputs = [record.output for record in records if record.output is not None]
    if isinstance(placement, Replicate) and all(out.shape == want.shape for out in outputs):
        total = torch.stack([widened(out) for out in outputs]).sum(0)
        if relative_rms(total, want) <= allowed:
            if all(torch.equal(out, outputs[0]) for out in outputs):
                return None, f"every rank gives 1/{len(outputs)} of TP=1's: an average, not a sum"
            return None, "the ranks' outputs are partial sums: a reduction is missing"
    # what is added after a sum, a bias, is no rank's term
    like = reference.partials[0][2] if len(reference.partials) == 1 else want
    found = _sum_over_ranks(records, like)
    if found is None:
        true = None
        if isinstance(placement, Partial):  # the code around the module sums what it gives
            true = _solve(_stacked(outputs), as_float64(want).flatten())
        return _off_by(true, "") if true is not None else (None, _as_a_bias(got, want))
    operands, result = found
    empty = [rank for rank, zero in enumerate((operands == 0).all(0).tolist()) if zero]
    if len(empty) == 1:
        return empty[0], f"rank {empty[0]}'s partial is all zeros"
    if relative_rms(operands.sum(1), result) > 1e-5:
        weights = _solve(operands, result)
        if weights is None:
            return None, "the reduction did not return the sum of the partials"
        return _name(weights, "the reduction counted rank {rank}'s partial {factor} times")
    true_sum = as_float64(like).flatten()
    if true_sum.numel() != result.numel():
        return None, ""
    if like is want and got.numel() == result.numel():  # TP=1 sums nothing: what is added is right
        true_sum = true_sum - (as_float64(got).flatten() - result)
    true = _solve(operands, true_sum)
    if true is not None:
        return _off_by(true, "")
    if said := _as_a_bias(got, want):
        return None, said
    return _attribution_in_places(operands, true_sum, max(allowed, 1e-6))


def _attribution_in_places(
    operands: torch.Tensor, true_sum: torch.Tensor, allowed: float
) -> tuple[int | None, str]:
    """A term may be off at one token, or in one channel, only: regress on these elements."""
    off = (operands.sum(1) - true_sum).abs() > allowed * rms(true_sum)
    ranks = range(operands.shape[1])
    zeros = [rank for rank in ranks if bool(off.any()) and not bool(operands[off, rank].any())]
    if len(zeros) == len(ranks):
        return None, "every rank's partial is zero where it differs"
    apart = bool((operands[~off] == 0).any())  # a zero is in its place, as in an embedding
    if len(zeros) == 1 and not apart:
        return zeros[0], f"rank {zeros[0]}'s partial is zero where it differs"
    given = [rank for rank in ranks if rank not in zeros]
    true = _solve(operands[off][:, given], true_sum[off])
    if true is not None:
        factors = torch.ones(len(ranks), dtype=true.dtype)
        factors[given] = true  # a zero may count as often as it likes
        return _off_by(factors, "where it differs, ")
    if apart and len(zeros) == len(ranks) - 1:
        (rank,) = set(ranks) - set(zeros)
        return rank, f"where it differs, only rank {rank}'s partial is not zero"
    return None, "the partials sum to something else, but not by a factor on any rank"


def _off_by(true: torch.Tensor, where: str) -> tuple[int | None, str]:
    """Name whose term is off, given by what each has to be multiplied to be right."""
    foreign = (true.abs() <= 1e-6).nonzero().flatten().tolist()
    if not foreign:
        return _name(1 / true, where + "rank {rank}'s partial is off by a factor of {factor}")
    if len(foreign) > 1 or int(((true - 1).abs() > 1e-6).sum()) > 1:
        return None, ""
    return foreign[0], f"{where}rank {foreign[0]}'s partial is one too many"


def _regression(
    records: Sequence[PointRecord],
    reference: PointRecord,
    placement: Placement,
    got: torch.Tensor,
    allowed: float,
) -> tuple[int | None, str]:
    """Regress the error onto the partials in the deployed dtype, where rounding is the noise."""
    want = reference.output
    assert want is not None
    summed = _sum_over_ranks(records, want)
    if summed is None or summed[1].numel() != got.numel():
        return None, ""
    found = most_scaled_rank(summed[0].T, (as_float64(got) - as_float64(want)).flatten())
    if found is None or not found.significant:
        return None, ""
    text = f"rank {found.rank}'s partial counts {found.factor:.6g} times (z={found.z:.0f})"
    return found.rank, text


def _sum_over_ranks(
    records: Sequence[PointRecord], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the ranks' terms [elements, ranks] of a module's only sum, and what it gave, whole.

    Args:
        like: what TP=1 gives there; pads of what is longer are left out.
    """
    if any(len(record.partials) != 1 for record in records):
        return None
    call, first, result = records[0].partials[0]
    terms = [record.partials[0][1] for record in records]
    if call.op == "reduce_scatter":
        dim = int(call.detail.removeprefix("dim=")) if call.detail.startswith("dim=") else 0
        result = torch.cat([record.partials[0][2] for record in records], dim)
    if result.shape != first.shape or any(term.shape != first.shape for term in terms):
        return None
    terms = [unpadded(term, like, len(records)) for term in terms]
    return _stacked(terms), as_float64(unpadded(result, like, len(records))).flatten()


def _is_dealt_out(records: Sequence[PointRecord], reference: PointRecord, allowed: float) -> bool:
    """Whether what is off is a sum over ranks of which each holds a piece."""
    if len(reference.partials) != 1 or reference.partials[0][0].op != "reduce_scatter":
        return False
    like = reference.partials[0][2]
    found = _sum_over_ranks(records, like)
    return found is not None and relative_rms(found[1], as_float64(like).flatten()) > allowed


def _stacked(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([as_float64(x).flatten() for x in terms], 1)


def _as_a_bias(got: torch.Tensor, want: torch.Tensor) -> str:
    """Say so where the error is the same at every token: that takes no partials to see."""
    if got.shape != want.shape or want[..., 0].numel() < 2:
        return ""
    error = (widened(got) - widened(want)).flatten(0, -2)
    if relative_rms(error, error[:1].expand_as(error)) >= 1e-6:
        return ""
    return "off by one and the same vector at every token, as a bias counted wrongly is"


def _solve(operands: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Return the factors that explain `target` exactly as a sum of operands, or None.

    Ranks whose terms are multiples of each other, as 1/N of a whole on each, share theirs: any
    split of it explains the sum as well, so none names a rank.
    """
    if operands.shape[0] <= operands.shape[1] or not operands.isfinite().all():
        return None
    spread = torch.linalg.svdvals(operands)
    if float(spread[-1]) <= _DEPENDENT * float(spread[0]):
        return None
    weights = torch.linalg.lstsq(operands, target.unsqueeze(1)).solution.squeeze(1)
    rest = operands @ weights - target
    return weights if rms(rest) <= 1e-6 * rms(target) else None


def _name(factors: torch.Tensor, text: str) -> tuple[int | None, str]:
    off = [(rank, f) for rank, f in enumerate(factors.tolist()) if abs(f - 1) > 1e-6]
    if not off:
        return None, ""
    said = ", ".join(text.format(rank=rank, factor=f"{f:.6g}") for rank, f in off[:3])
    return off[0][0] if len(off) == 1 else None, said


def _points(trace: Trace) -> Points:
    """Return what was traced: modules, or collectives where there are none."""
    found: Points = trace.extras.get("points") or trace.extras.get("calls", {})
    return found
