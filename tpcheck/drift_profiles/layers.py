"""The part of a drift profile that looks inside: error by depth, and row-parallel layers.

Requirement: logits dilute what a reduction does. After each traced layer the residual stream shows
where drift begins; at each row-parallel layer whose placements are declared, the ranks' exact terms
are found, which reductions.py holds against its outputs.

[Exact Terms] TP=1 in float64 is run on a layer's own input at TP=N with all ranks' features but
one's set to zero: what it gives is that rank's exact term, whatever the ranks do with theirs. So a
layer has to be linear, which is held against its answer to the whole input.
[TP=1 As Control] A layer may round more than its output, whoever sums: a weight of 4 bits is
dequantized into the deployed dtype, float32 products err as much as their sum. TP=1 as deployed,
held against float64 on its own input, says by how much.

Shape legend: R ranks, N outputs of one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpcheck.errors import SubjectError
from tpcheck.numerics.alarm import Declared, Wealth, law_sigma
from tpcheck.numerics.ulp import eps
from tpcheck.observation.modules import PointRecord
from tpcheck.placement import Replicate, Shard, Slices
from tpcheck.sharding import unshard
from tpcheck.trace import Trace

Json = dict[str, Any]

MAX_BYTES = 1 << 28
"""Inputs of layers that are sent to TP=1: the first layers, as far as they fit."""

_LAYER = re.compile(r"(^|\.)\d+$")
_LINEAR = 1e-9
"""Relative rms by which a layer's terms may miss its whole answer in float64."""


@dataclass(frozen=True, slots=True)
class RowParallel:
    """One row-parallel layer as it ran: its output, and every rank's exact term, [R, ...].

    sent: the terms as the ranks handed them to the sum, where that could be seen. tp1_errors: what
    TP=1 as deployed leaves there, output by output, and tp1_excess, over that of rounding each
    output once; see [TP=1 As Control].
    """

    fqn: str
    actual: Tensor
    terms: Tensor
    sent: Tensor | None = None
    tp1_errors: Tensor | None = None
    tp1_excess: float = 1.0


def depth(base: Trace, native: Trace, oracle: Trace, dtype: str) -> Json:
    """Return the error after each traced layer, or each traced module where none is a layer.

    A layer is a module whose name ends with its number: what it returns is the residual stream.

    Returns:
        `points`: in order of execution, each with `fqn`, `tp1_epsilons`, `epsilons`, `ratio` (None
        where TP=1 has no error) and `not_finite`: values that TP=N lost, so that it has no error
        there; `begins`: the first module, of all that every rank returns
        whole, where TP=N has other bits than TP=1; None where they are equal throughout.
    """
    points = _points(oracle)
    order = sorted(points, key=lambda name: points[name].finished)
    whole = [fqn for fqn in order if _whole(fqn, base, native, oracle)]
    layers = [fqn for fqn in whole if _LAYER.search(fqn.partition("#")[0])]
    begins = next((fqn for fqn in whole if not _same_bits(fqn, base, native)), None)
    shown = [_point(fqn, base, native, oracle, dtype) for fqn in layers or whole]
    return {"points": shown, "begins": begins}


def _point(fqn: str, base: Trace, native: Trace, oracle: Trace, dtype: str) -> Json:
    want = _output(oracle, fqn).double()
    unit = eps(dtype) * _rms(want)
    lost_1, lost_n = (_lost(_output(trace, fqn), want) for trace in (base, native))
    at_1, at_n = (
        _rms(_output(trace, fqn).double() - want) / unit if unit and not lost else None
        for trace, lost in ((base, lost_1), (native, lost_n))
    )
    return {
        "fqn": fqn,
        "tp1_epsilons": at_1,
        "epsilons": at_n,
        "ratio": at_n / at_1 if at_1 and at_n is not None else None,
        "not_finite": lost_n,
    }


def _lost(actual: Tensor, want: Tensor) -> int:
    """Return how many values are not finite where the oracle's are: none has an error."""
    return int((want.isfinite() & ~actual.isfinite()).sum())


def split_inputs(
    base: Trace, native: Sequence[Trace], max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """Return what exact terms are asked of TP=1 for: per row-parallel layer, R + 3 inputs as one.

    One with each rank's features alone, one of zeros, the whole, and what TP=1 itself was given;
    float64, one after the other along the first dim. As many layers as fit into `max_bytes`, in
    order of execution.
    """
    asked: dict[str, Tensor] = {}
    left = max_bytes
    points = _points(base)
    for fqn in sorted(points, key=lambda name: points[name].finished):
        record = points[fqn]
        if record.input is None or any(fqn not in _points(trace) for trace in native):
            continue
        records = [_points(trace)[fqn] for trace in native]
        placements = [one.in_placement for one in records]
        if not all(isinstance(one, (Shard, Slices)) for one in placements):
            continue
        if not all(isinstance(one.out_placement, Replicate) for one in records):
            continue
        pieces = [one.input for one in records if one.input is not None]
        shape = record.input.shape
        if len(pieces) < len(records) or not all(x.is_floating_point() for x in pieces):
            continue
        left -= (len(pieces) + 3) * record.input.numel() * 8
        if left < 0:
            break
        zeros = [torch.zeros_like(piece) for piece in pieces]
        alone = [[*zeros[:r], piece, *zeros[r + 1 :]] for r, piece in enumerate(pieces)]
        try:
            whole = [
                unshard(one, placements, shape)  # type: ignore[arg-type]
                for one in (*alone, zeros, pieces)
            ]
        except SubjectError:
            continue  # uneven pieces with pads of their own: nothing is known of them
        asked[fqn] = torch.cat([*whole, record.input.to(whole[0])]).double()
    return asked


def summed_elsewhere(fqns: Iterable[str], native: Sequence[Trace]) -> str:
    """Return the first of these layers that sums its terms without a reduction, or ""."""
    return next((fqn for fqn in fqns if any(not _points(t)[fqn].partials for t in native)), "")


def row_parallel(
    answers: Mapping[str, PointRecord], base: Trace, native: Sequence[Trace], dtype: str
) -> tuple[list[RowParallel], dict[str, str]]:
    """Return the row-parallel layers whose terms are known, and why others are left out.

    Args:
        answers: FQN -> what TP=1 gave in float64 for `split_inputs`.
        base: TP=1's trace of the forward as deployed.
        native: all ranks' traces of the same.
        dtype: the deployed one.
    """
    found: list[RowParallel] = []
    left_out: dict[str, str] = {}
    for fqn, answer in answers.items():
        records = [_points(trace)[fqn] for trace in native]
        output = records[0].output
        if output is None or answer.output is None:
            continue
        *alone, bias, whole, own = answer.output.double().chunk(len(native) + 3)
        terms = torch.stack([part - bias for part in alone])
        if not terms.isfinite().all() or _rms(terms.sum(0) + bias - whole) > _LINEAR * _rms(whole):
            left_out[fqn] = "it is not linear: no rank has a term of its own"
            continue
        sums = [record.partials for record in records]
        seen = all(len(one) == 1 and one[0][1].shape == output.shape for one in sums)
        if bool(bias.any()) and not seen:
            left_out[fqn] = "its bias is added after a sum that does not go through TPGroup"
            continue
        actual = sums[0][0][2].to(output.dtype) if seen else output
        sent = torch.stack([one[0][1].double() for one in sums]) if seen else None
        layer = RowParallel(fqn, actual, terms, sent)
        found.append(_with_control(layer, _points(base)[fqn].output, own, bias, dtype))
    return found, left_out


def _with_control(
    layer: RowParallel, output: Tensor | None, exact: Tensor, bias: Tensor, dtype: str
) -> RowParallel:
    """Add what TP=1 leaves on its own input, held against its product and its bias rounded."""
    if output is None or output.shape != exact.shape:
        return layer
    product, named = exact - bias, getattr(torch, dtype)
    rounded = product.to(named) + bias.to(named)
    sigma = law_sigma(product.reshape(1, -1), "wide", named)
    once = Declared(exact.flatten(), sigma, (rounded.double() - exact).flatten())
    excess = Wealth().after(output, once).excess
    return replace(layer, tp1_errors=output.double() - exact, tp1_excess=excess)


def observed_sums(
    native: Sequence[Trace], dtype: str, max_bytes: int = MAX_BYTES
) -> list[RowParallel]:
    """Return the sums over all ranks of a forward as they were seen: terms as sent, and results.

    What a rank did to its term before it sent it is not in there. Only sums to which ranks sent
    equal shapes and more than one had something to add, scattered along dim 0 or not at all; as
    many as fit into `max_bytes`.
    """
    found: list[RowParallel] = []
    for name, calls in _sums_by_name(native):
        (call, first, result), *_ = calls
        alike = all(x.shape == first.shape and x.dtype == first.dtype for _, x, _ in calls)
        if call.detail not in ("sum", "dim=0") or not alike:
            continue
        if call.op == "reduce_scatter":
            result = torch.cat([piece for _, _, piece in calls])
        max_bytes -= len(calls) * first.numel() * 8
        if max_bytes < 0:
            break
        terms = torch.stack([x.double() for _, x, _ in calls])
        if first.is_floating_point() and bool(((terms != 0).sum(0) > 1).any()):
            found.append(RowParallel(name, result.to(getattr(torch, dtype)), terms, terms))
    return found


def _sums_by_name(native: Sequence[Trace]) -> list[tuple[str, list[Any]]]:
    """Return each sum's (call, operand, result) of every rank, in order of execution."""
    per_rank = []
    for trace in native:
        points = _points(trace)
        order = sorted(points, key=lambda name: points[name].finished)
        sums = [(fqn, points[fqn].partials) for fqn in order]
        per_rank.append([*sums, ("forward", trace.extras.get("outside", []))])
    found = []
    for (fqn, first), *others in zip(*per_rank, strict=False):
        if any(name != fqn or len(sums) != len(first) for name, sums in others):
            continue
        every = [first, *(sums for _, sums in others)]
        for i in range(len(first)):
            name = fqn if len(first) == 1 else f"{fqn}, sum {i + 1}"
            found.append((name, [sums[i] for sums in every]))
    return found


def _whole(fqn: str, *traces: Trace) -> bool:
    outputs = [_points(trace)[fqn].output for trace in traces if fqn in _points(trace)]
    if len(outputs) < len(traces) or any(output is None for output in outputs):
        return False
    kept = [output for output in outputs if output is not None]
    return all(one.shape == kept[0].shape and one.is_floating_point() for one in kept)


def _same_bits(fqn: str, base: Trace, native: Trace) -> bool:
    return torch.equal(_output(base, fqn), _output(native, fqn))


def _output(trace: Trace, fqn: str) -> Tensor:
    output = _points(trace)[fqn].output
    assert output is not None
    return output


def _points(trace: Trace) -> Mapping[str, PointRecord]:
    found: Mapping[str, PointRecord] = trace.extras.get("points", {})
    return found


def _rms(x: Tensor) -> float:
    finite = x.isfinite()
    count = int(finite.sum())
    return float((x.masked_fill(~finite, 0.0).square().sum() / max(count, 1)).sqrt())
