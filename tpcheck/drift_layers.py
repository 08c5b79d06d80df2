"""The part of a drift profile that looks inside: error by depth, and which reduction it was.

Requirement: logits dilute what a reduction does. After each traced layer the residual stream shows
where drift begins; at each row-parallel layer whose placements are declared, the ranks' exact terms
are known, so the reduction can be named, held against the declared one, and a rank that counts
wrongly found.

[Exact Terms] TP=1 in float64 is run on a layer's own input at TP=N with all ranks' features but
one's set to zero: what it gives is that rank's exact term, whatever the ranks do with theirs. So a
layer has to be linear, which is held against its answer to the whole input.

Shape legend: R ranks, N outputs of one layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcheck.errors import SubjectError
from tpcheck.numerics.alarm import JUDGED, Wealth, declare
from tpcheck.numerics.identification import Hypothesis, Likelihood, describe, identify
from tpcheck.numerics.regression import rank_factors
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

    sent: the terms as the ranks handed them to the sum, where that could be seen.
    """

    fqn: str
    actual: Tensor
    terms: Tensor
    sent: Tensor | None = None


def depth(base: Trace, native: Trace, oracle: Trace, dtype: str) -> Json:
    """Return the error after each traced layer, or each traced module where none is a layer.

    A layer is a module whose name ends with its number: what it returns is the residual stream.

    Returns:
        `points`: in order of execution, each with `fqn`, `tp1_epsilons`, `epsilons` and `ratio`
        (None where TP=1 has no error); `begins`: the first module, of all that every rank returns
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
    step = eps(dtype) * _rms(want)
    at_1, at_n = (_rms(_output(trace, fqn).double() - want) for trace in (base, native))
    return {
        "fqn": fqn,
        "tp1_epsilons": at_1 / step if step else None,
        "epsilons": at_n / step if step else None,
        "ratio": at_n / at_1 if at_1 else None,
    }


def split_inputs(
    base: Trace, native: Sequence[Trace], max_bytes: int = MAX_BYTES
) -> dict[str, Tensor]:
    """Return what exact terms are asked of TP=1 for: per row-parallel layer, R + 2 inputs as one.

    One with each rank's features alone, one of zeros, and the whole; float64, one after the other
    along the first dim. As many layers as fit into `max_bytes`, in order of execution.
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
        left -= (len(pieces) + 2) * record.input.numel() * 8
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
        asked[fqn] = torch.cat(whole).double()
    return asked


def summed_elsewhere(fqns: Iterable[str], native: Sequence[Trace]) -> str:
    """Return the first of these layers that sums its terms without a reduction, or ""."""
    return next((fqn for fqn in fqns if any(not _points(t)[fqn].partials for t in native)), "")


def row_parallel(
    answers: Mapping[str, PointRecord], native: Sequence[Trace], dtype: str
) -> tuple[list[RowParallel], dict[str, str]]:
    """Return the row-parallel layers whose terms are known, and why others are left out.

    Args:
        answers: FQN -> what TP=1 gave in float64 for `split_inputs`.
        native: all ranks' traces of the forward as deployed.
        dtype: the deployed one.
    """
    found: list[RowParallel] = []
    left_out: dict[str, str] = {}
    ranks = len(native)
    for fqn, answer in answers.items():
        records = [_points(trace)[fqn] for trace in native]
        output = records[0].output
        if output is None or answer.output is None:
            continue
        parts = answer.output.double().chunk(ranks + 2)
        bias = parts[ranks]
        terms = torch.stack([part - bias for part in parts[:ranks]])
        apart = _rms(terms.sum(0) + bias - parts[-1])
        if not terms.isfinite().all() or apart > _LINEAR * _rms(parts[-1]):
            left_out[fqn] = "it is not linear: no rank has a term of its own"
            continue
        own = [record.partials for record in records]
        seen = all(len(one) == 1 and one[0][1].shape == output.shape for one in own)
        actual = own[0][0][2].to(output.dtype) if seen else output
        if bool(bias.any()) and not seen:
            left_out[fqn] = "its bias is added after a sum that does not go through TPGroup"
            continue
        sent = torch.stack([one[0][1].double() for one in own]) if seen else None
        found.append(RowParallel(fqn, actual, terms, sent))
    return found, left_out


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


def layers_json(
    layers: Sequence[RowParallel], declared: str, dtype: str, *, terms: str = "exact"
) -> Json:
    """Return which reduction each row-parallel layer's outputs show, and all of them together.

    Args:
        declared: the kind of reduction that the engine says it uses, in the deployed dtype.
        terms: "exact", or "sent" where layers are sums that were seen (`observed_sums`).

    Returns:
        `declared`; `terms`; `reduction`, of all layers together, and `layers`, a list with `fqn`
        each. Both have `outputs`; `identified`, a sentence; `findings`, the three most probable:
        `hypotheses`, `probability`, `reproduced`, `tipped`, `explains`; and `alarm`: `raised`
        ("wider", "narrower" or ""), `count`, `excess` (rms error over the declared one) and the
        bets' logarithms with their sums, None with a reason where the law does not cover the kind.
        Layers also have `term_energy`, each rank's share, `rank_z`, by how many standard errors
        each rank's term is not counted once, and `scaled_rank`: `rank`, `factor`, `z` and
        `significant` of the rank whose term is counted most wrongly; None where nothing can be
        said.
    """
    entries = []
    total: dict[Hypothesis, float] = {}
    judged: list[tuple[int, tuple[Likelihood, ...]]] = []
    wealth = Wealth()
    for layer in layers:
        actual_N, terms_RN = _outputs(layer, dtype)
        findings = identify(actual_N, terms_RN)
        judged.append((actual_N.numel(), findings))
        for finding in findings:
            for hypothesis in finding.hypotheses:
                total[hypothesis] = total.get(hypothesis, 0.0) + finding.log_likelihood
        alarm: Json = {"alarm": None, "alarm_reason": _not_judged(declared)}
        if declared in JUDGED:
            expected = declare(terms_RN, declared, getattr(torch, dtype))
            wealth = wealth.after(actual_N, expected)
            alarm = {"alarm": _alarm(Wealth().after(actual_N, expected))}
        exact_RN = layer.terms.flatten(1)
        factors = rank_factors(exact_RN, layer.actual.double().flatten() - exact_RN.sum(0))
        scaled = None if factors is None else max(factors, key=lambda one: abs(one.z))
        energy = exact_RN.square().sum(1)
        entries.append(
            {
                "fqn": layer.fqn,
                **_identified(findings, actual_N.numel()),
                **alarm,
                "term_energy": (energy / energy.sum()).tolist() if bool(energy.sum()) else None,
                "scaled_rank": None
                if scaled is None
                else {
                    "rank": scaled.rank,
                    "factor": scaled.factor,
                    "z": scaled.z,
                    "significant": scaled.significant,
                },
                "rank_z": None if factors is None else [one.z for one in factors],
            }
        )
    together = _together(judged, total)
    pooled: Json = _identified(together, sum(count for count, _ in judged))
    if declared in JUDGED:
        pooled["alarm"] = _alarm(wealth)
    else:
        pooled |= {"alarm": None, "alarm_reason": _not_judged(declared)}
    return {"declared": declared, "terms": terms, "reduction": pooled, "layers": entries}


def _outputs(layer: RowParallel, dtype: str) -> tuple[Tensor, Tensor]:
    """Return a layer's outputs [N] and the terms [R, N] that they are held against.

    Float32 terms are those that were sent, where they are known: local products in float32 round as
    much as the sum does, and nothing wider made them.
    """
    sent = layer.sent if dtype == "float32" else None
    terms = layer.terms if sent is None else sent
    return layer.actual.flatten(), terms.flatten(1)


def _together(
    judged: Sequence[tuple[int, tuple[Likelihood, ...]]], total: Mapping[Hypothesis, float]
) -> tuple[Likelihood, ...]:
    """Return the findings of all layers together: what no layer tells apart is one."""
    outputs = sum(count for count, _ in judged)
    groups: dict[tuple[int, ...], list[Hypothesis]] = {}
    for hypothesis in total:
        key = tuple(_group_of(hypothesis, findings) for _, findings in judged)
        groups.setdefault(key, []).append(hypothesis)
    best = max((total[members[0]] for members in groups.values()), default=0.0)
    scale = sum(math.exp(total[members[0]] - best) for members in groups.values())
    merged = []
    for key, members in groups.items():
        own = [(n, findings[i]) for (n, findings), i in zip(judged, key, strict=True)]
        merged.append(
            Likelihood(
                tuple(members),
                sum(n * one.reproduced for n, one in own) / outputs,
                sum(n * one.tipped for n, one in own) / outputs,
                total[members[0]],
                math.exp(total[members[0]] - best) / scale,
            )
        )
    return tuple(sorted(merged, key=lambda one: -one.log_likelihood))


def _group_of(hypothesis: Hypothesis, findings: Sequence[Likelihood]) -> int:
    return next(i for i, one in enumerate(findings) if hypothesis in one.hypotheses)


def _identified(findings: Sequence[Likelihood], outputs: int) -> Json:
    return {
        "outputs": outputs,
        "identified": describe(findings),
        "findings": [
            {
                "hypotheses": [str(one) for one in finding.hypotheses],
                "probability": finding.probability,
                "reproduced": finding.reproduced,
                "tipped": finding.tipped,
                "explains": finding.explains,
            }
            for finding in findings[:3]
        ],
    }


def _alarm(wealth: Wealth) -> Json:
    return {
        "raised": wealth.alarm(),
        "count": wealth.count,
        "excess": wealth.excess,
        "squares": wealth.squares,
        "expected": wealth.expected,
        "wider": wealth.wider,
        "narrower": wealth.narrower,
    }


def _not_judged(declared: str) -> str:
    return f"the law covers {', '.join(JUDGED)}, not {declared}"


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
