"""locate(...) -> FirstDivergence: the first traced module that leaves its reference.

Requirement: a failing verdict names a module, a rank and an index range, not a logit. Modules are
taken in the order in which they returned, so an inner module is blamed before the one around it.
Where placements are declared the module is judged on the reference's own input (a replay), so an
upstream error is not blamed on what follows; at a row-parallel layer the regression onto the
captured partials names the rank and the factor.

[Undeclared Placements] An output without a declared placement is read as Replicate when all ranks
hold the same bits or the reference's values, else as Shard(dim) when the sizes add up, else as
Partial("sum"). Two dims that fit equally well are a tie, and the point is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tpcheck.comparison import compare, describe_region, mask_difference
from tpcheck.numerics.regression import most_scaled_rank
from tpcheck.observation.modules import PointRecord
from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices
from tpcheck.records import FirstDivergence
from tpcheck.trace import Trace

Points = Mapping[str, PointRecord]


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
    for fqn in sorted(points, key=lambda name: points[name].finished):
        want = points[fqn].output
        if want is None or any(fqn not in _points(trace) for trace in traces):
            continue
        allowed = limit
        if base is not None and fqn in _points(base):
            allowed = max(limit, ratio_limit * _relative(_points(base)[fqn].output, want))
        found = _judge_point(fqn, want, traces, allowed, exact=base is None)
        if found is not None:
            return found
    return None


def _judge_point(
    fqn: str, want: torch.Tensor, traces: Sequence[Trace], allowed: float, *, exact: bool
) -> FirstDivergence | None:
    replayed = all(fqn in trace.extras.get("replayed", {}) for trace in traces)
    records = [
        (trace.extras["replayed"] if replayed else trace.extras["points"])[fqn] for trace in traces
    ]
    outputs = [record.output for record in records]
    if any(output is None for output in outputs):
        return None
    declared = [record.out_placement for record in records]
    placements = declared if declared[0] is not None else _infer(outputs, want, allowed)
    if placements is None:
        return None
    rank, got = _reconciled(outputs, placements, want, allowed)
    if got is None or _relative(got, want) <= allowed:
        return None
    if got.shape != want.shape:
        detail = f"shape={list(got.shape)}, but should be {list(want.shape)} as at TP=1"
        return FirstDivergence(fqn, rank, detail=detail)
    size = _rms(torch.where(want.isfinite(), want, 0.0))
    bad = (got.double() - want.double()).abs() > max(allowed, 1e-15) * size
    bad |= mask_difference(got, want)
    worst = compare(got, want, dtype=outputs[0].dtype)
    notes = [f"relative rms {worst.relative_rms:.3g}"]
    notes += ["on the reference's own input"] if replayed else []
    if declared[0] is None:
        notes.append(f"read as {placements[0]}")
    attribute = _attribution if exact else _regression
    blamed, text = attribute(records, want, placements[0], allowed)
    notes += [text] if text else []
    return FirstDivergence(
        fqn=fqn,
        rank=blamed if blamed is not None else rank,
        index=describe_region(bad),
        ulp=worst.worst_ulp,
        detail="; ".join(notes),
    )


def _infer(
    outputs: Sequence[torch.Tensor], want: torch.Tensor, allowed: float
) -> list[Placement] | None:
    size = len(outputs)
    if all(output.shape == want.shape for output in outputs):
        right = all(_relative(output, want) <= allowed for output in outputs)
        same = right or all(torch.equal(output, outputs[0]) for output in outputs)
        return [Replicate() if same else Partial()] * size
    if any(output.ndim != want.ndim for output in outputs):
        return None
    dims = [
        dim
        for dim in range(want.ndim)
        if sum(output.shape[dim] for output in outputs) == want.shape[dim]
        and all(
            output.shape[:dim] + output.shape[dim + 1 :] == want.shape[:dim] + want.shape[dim + 1 :]
            for output in outputs
        )
    ]
    return [Shard(dims[0])] * size if len(dims) == 1 else None


def _reconciled(
    outputs: Sequence[torch.Tensor],
    placements: Sequence[Placement],
    want: torch.Tensor,
    allowed: float,
) -> tuple[int | None, torch.Tensor | None]:
    """Return (the rank to blame, if one can be told; the logical tensor as the ranks hold it)."""
    kind = placements[0]
    if isinstance(kind, Replicate):
        off = [r for r, out in enumerate(outputs) if _relative(out, want) > allowed]
        only = off[0] if off and len(off) < len(outputs) else None
        return only, outputs[off[0] if off else 0]
    if isinstance(kind, Partial):
        if any(output.shape != want.shape for output in outputs):
            return None, None
        total = torch.stack([output.double() for output in outputs]).sum(0)
        if _relative(total, want) <= allowed:
            return None, total
        off = [r for r, out in enumerate(outputs) if _relative(out, want) > allowed]
        if 0 < len(off) < len(outputs):  # copies after all, and some are right
            return off[0], outputs[off[0]]
        return None, total
    if isinstance(kind, Shard):
        try:
            whole = torch.cat(list(outputs), kind.dim)
        except RuntimeError:
            return None, None
    else:
        whole = torch.zeros_like(want)
        for output, placement in zip(outputs, placements, strict=True):
            assert isinstance(placement, Slices)
            for here, there in placement.pieces:
                whole[there] = output[here]
    if whole.shape != want.shape:
        return None, whole
    return _shard_to_blame(outputs, kind, whole, want, allowed), whole


def _shard_to_blame(
    outputs: Sequence[torch.Tensor],
    kind: Placement,
    whole: torch.Tensor,
    want: torch.Tensor,
    allowed: float,
) -> int | None:
    if not isinstance(kind, Shard):
        return None
    sizes = [output.shape[kind.dim] for output in outputs]
    pieces = zip(whole.split(sizes, kind.dim), want.split(sizes, kind.dim), strict=True)
    off = [rank for rank, (got, ref) in enumerate(pieces) if _relative(got, ref) > allowed]
    return off[0] if off and len(off) < len(outputs) else None


def _attribution(
    records: Sequence[PointRecord], want: torch.Tensor, placement: Placement, allowed: float
) -> tuple[int | None, str]:
    """Regress onto the captured partials: which rank's term is missing, foreign or scaled."""
    outputs = [record.output for record in records if record.output is not None]
    if isinstance(placement, Replicate) and all(out.shape == want.shape for out in outputs):
        total = torch.stack([out.double() for out in outputs]).sum(0)
        if _relative(total, want) <= allowed:
            return None, "the ranks' outputs are partial sums: a reduction is missing"
    if any(len(record.partials) != 1 for record in records):
        return None, ""
    operands = torch.stack([record.partials[0][1].double().flatten() for record in records], 1)
    empty = [rank for rank, zero in enumerate((operands == 0).all(0).tolist()) if zero]
    if len(empty) == 1:
        return empty[0], f"rank {empty[0]}'s partial is all zeros"
    result = records[0].partials[0][2].double().flatten()
    if operands.shape[0] != result.numel():
        return None, ""
    if _relative(operands.sum(1), result) > 1e-5:
        weights = _solve(operands, result)
        if weights is None:
            return None, "the reduction did not return the sum of the partials"
        return _name(weights, "the reduction counted rank {rank}'s partial {factor} times")
    if want.numel() != result.numel():
        return None, ""
    true = _solve(operands, want.double().flatten())
    if true is None and records[0].output is not None and _same_for_every_token(records, want):
        return None, "off by one and the same vector at every token, as a bias counted wrongly is"
    if true is None:
        return None, "the partials sum to something else, but not by a factor on any rank"
    return _name(1 / true, "rank {rank}'s partial is off by a factor of {factor}")


def _regression(
    records: Sequence[PointRecord], want: torch.Tensor, placement: Placement, allowed: float
) -> tuple[int | None, str]:
    """Regress the error onto the partials in the deployed dtype, where rounding is the noise."""
    if any(len(record.partials) != 1 for record in records) or records[0].output is None:
        return None, ""
    partials = torch.stack([record.partials[0][1].double().flatten() for record in records])
    error = (records[0].output.double() - want.double()).flatten()
    if partials.shape[1] != error.numel():
        return None, ""
    found = most_scaled_rank(partials, error)
    if found is None or not found.significant:
        return None, ""
    text = f"rank {found.rank}'s partial counts {found.factor:.6g} times (z={found.z:.0f})"
    return found.rank, text


def _same_for_every_token(records: Sequence[PointRecord], want: torch.Tensor) -> bool:
    output = records[0].output
    if output is None or output.shape != want.shape or want[..., 0].numel() < 2:
        return False
    error = (output.double() - want.double()).flatten(0, -2)
    return _relative(error, error[:1].expand_as(error)) < 1e-6


def _solve(operands: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Return the factors that explain `target` exactly as a sum of operands, or None."""
    if operands.shape[0] <= operands.shape[1] or not operands.isfinite().all():
        return None
    weights = torch.linalg.lstsq(operands, target.unsqueeze(1)).solution.squeeze(1)
    rest = operands @ weights - target
    return weights if _rms(rest) <= 1e-6 * _rms(target) else None


def _name(factors: torch.Tensor, text: str) -> tuple[int | None, str]:
    off = [(rank, f) for rank, f in enumerate(factors.tolist()) if abs(f - 1) > 1e-6]
    if not off:
        return None, ""
    said = ", ".join(text.format(rank=rank, factor=f"{f:.6g}") for rank, f in off[:3])
    return off[0][0] if len(off) == 1 else None, said


def _points(trace: Trace) -> Points:
    found: Points = trace.extras.get("points", {})
    return found


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _relative(got: torch.Tensor | None, want: torch.Tensor) -> float:
    """Relative rms over finite elements; infinite when shapes or masks differ."""
    if got is None or got.shape != want.shape:
        return float("inf")
    a, b = got.double(), want.double()
    finite = a.isfinite() & b.isfinite()
    if not bool((a.isfinite() == b.isfinite()).all()):
        return float("inf")
    error, size = _rms(torch.where(finite, a - b, 0.0)), _rms(torch.where(finite, b, 0.0))
    return 0.0 if error == 0 else error / size if size else float("inf")
