"""Checks of conduct: facts about ranks, calls and shards that no tolerance enters.

Requirement: same bits on every rank, same bits again, the same schedule, shards that tile. Each has
a fault that leaves the numbers of rank 0 untouched, so that only it can see it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tpcheck.comparison import describe_region
from tpcheck.evidence import Evidence
from tpcheck.execution import AGAIN
from tpcheck.placement import Placement, Shard, Slices
from tpcheck.records import FAIL, PASS, SKIPPED, Check
from tpcheck.sharding import tiling_problems
from tpcheck.trace import Collective, Trace


def rank_agreement(evidence: Evidence) -> Check:
    """Every rank returns the same bits, in both dtypes."""
    if evidence.logits == "rank0":
        return Check(SKIPPED, 'the subject declares logits="rank0"')
    for traces in (evidence.exact, evidence.deployed):
        for key in traces[0].digests if traces else ():
            digests = [trace.digests.get(key) for trace in traces]
            common = Counter(digests).most_common(1)[0][0]
            odd = [rank for rank, value in enumerate(digests) if value != common]
            if odd:
                detail = _disagreement(traces[odd[0]], traces[digests.index(common)], key)
                return Check(
                    FAIL, f"{key}: {_ranks(odd)} returned other bits than the rest{detail}"
                )
    return Check(PASS)


def repeatability(evidence: Evidence) -> Check:
    """Inputs A, B, A on one built subject: the second A has the first one's bits on every rank."""
    if (again := evidence.rebuilt) is not None and evidence.oracle is not None:
        other = [key for key in again.digests if again.digests[key] != evidence.oracle.digests[key]]
        if other and not _on_gpu(again):
            return Check(
                FAIL,
                f"{other[0]}: TP=1 in {evidence.oracle_dtype} gave other bits when it was built"
                " again: build(tp) leaves state behind that the next one finds (a cached module, a"
                " global), or chance decides",
            )
    seen = False
    runs = ((evidence.oracle, evidence.exact), (evidence.base, evidence.deployed))
    for alone, traces in runs:
        for trace in traces:
            if AGAIN not in trace.digests:
                continue
            seen = True
            if trace.digests[AGAIN] != trace.digests["A"]:
                if _on_gpu(trace) and alone is not None and not _repeats(alone):
                    return Check(SKIPPED, "TP=1 itself does not repeat its bits on this GPU")
                return Check(
                    FAIL,
                    f"rank {trace.rank}: the same input gave other bits after another input"
                    f"{_change(trace)}: state leaks from one call into the next, or chance decides"
                    " (a race, a random draw)",
                )
    return Check(PASS) if seen else Check(SKIPPED, "no input was run twice")


def schedule(evidence: Evidence) -> Check:
    """The same sequence of collectives on every rank, forward by forward."""
    for traces in (evidence.exact, evidence.deployed):
        for trace in traces[1:]:
            for phase, calls in traces[0].collectives.items():
                problem = _schedule_difference(calls, trace.collectives.get(phase, ()))
                if problem:
                    here, there = problem
                    return Check(
                        FAIL, f"{phase}: rank 0 called {here}, rank {trace.rank} called {there}"
                    )
    counts = Counter(call.op for call in evidence.deployed[0].collectives.get("A", ()))
    return Check(PASS, "", {"per_forward": dict(sorted(counts.items()))})


def tiling(evidence: Evidence) -> Check:
    """Exposed shards hold each logical element at least once, with the values TP=1 has."""
    shards = [trace.extras.get("shards") for trace in evidence.deployed]
    skipped = Check(SKIPPED, "the subject exposes no shards")
    problems = _consumption_problems(evidence)
    if any(s is None for s in shards):
        return Check(FAIL, "; ".join(problems)) if problems else skipped
    whole = evidence.base.extras.get("shards") or {}
    names = list(dict.fromkeys(name for held in shards for name in held or {}))
    problems += [f"{name}: exposed at TP=1, but by no rank" for name in whole if name not in names]
    for name in names:
        missing = [rank for rank, held in enumerate(shards) if name not in (held or {})]
        if missing:
            problems.append(f"{name}: {_ranks(missing)} expose no shard of it")
            continue
        entries = [held[name] for held in shards if held is not None]
        locals_, placements = [e[0] for e in entries], [e[1] for e in entries]
        expected = _logical(*whole[name]) if name in whole else None
        problems += [
            f"{name}: {problem}"
            for problem in tiling_problems(
                _logical_shape(locals_, placements) if expected is None else expected.shape,
                placements,
                locals_,
                expected,
            )
        ]
    facts = {"tensors": len(names), "compared_with_tp1": sum(name in whole for name in names)}
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        return Check(FAIL, "; ".join(problems[:3]) + more, facts)
    return Check(PASS, "", facts) if names else skipped


def _schedule_difference(
    left: Sequence[Collective], right: Sequence[Collective]
) -> tuple[str, str] | None:
    left = [call for call in left if call.op not in ("send", "recv", "recv_any_source")]
    right = [call for call in right if call.op not in ("send", "recv", "recv_any_source")]
    for position in range(max(len(left), len(right))):
        here = left[position] if position < len(left) else None
        there = right[position] if position < len(right) else None
        if here is None or there is None or _signature(here) != _signature(there):
            return tuple(  # type: ignore[return-value]
                "nothing more" if call is None else f"#{position} {call.describe()}"
                for call in (here, there)
            )
    return None


def _signature(call: Collective) -> tuple[Any, ...]:
    """torch.distributed allows uneven operands in everything but a reduction over equal shapes."""
    if call.detail == "torch.distributed" and "reduce" not in call.op:
        return (call.op, call.dtype)
    return call.signature()


def _consumption_problems(evidence: Evidence) -> list[str]:
    """Names that TP=1's loader uses but no rank's does, or that a rank's uses more often.

    One rank may well leave a name to others: it holds other experts, or is sent what rank 0 reads.
    """
    at_1: Mapping[str, int] = evidence.base.extras.get("consumed") or {}
    at_n: list[Mapping[str, int]] = [t.extras.get("consumed") or {} for t in evidence.deployed]
    skipped = [n for n, times in at_1.items() if times and not any(c.get(n) for c in at_n)]
    problems = []
    if skipped:
        problems.append(f"no rank consumes the named weights {_some(skipped)}, but TP=1 does")
    for trace, consumed in zip(evidence.deployed, at_n, strict=True):
        often = [(n, c) for n, c in consumed.items() if n in at_1 and c > at_1[n]]
        problems += [
            f"named weight {name}: consumed {times} times on rank {trace.rank}, but should be"
            f" {at_1[name]} as at TP=1"
            for name, times in often[:4]
        ]
    return problems


def loading_remarks(base: Trace) -> tuple[str, ...]:
    """Say which named weights TP=1 never reads, or reads more than once, which may be right."""
    consumed: Mapping[str, int] = base.extras.get("consumed") or {}
    never = [name for name, times in consumed.items() if times == 0]
    often = [f"{name} ({times} times)" for name, times in consumed.items() if times > 1]
    said = [f"never reads {_some(never)}"] * bool(never)
    said += [f"reads {_some(often)}"] * bool(often)
    return (f"weights: of the named ones TP=1 {', and '.join(said)}",) if said else ()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _disagreement(odd: Trace, usual: Trace, key: str) -> str:
    where = _other_bits(odd.outputs.get(key), usual.outputs.get(key))
    return f", first at {where}" if where else ""


def _change(trace: Trace) -> str:
    where = _other_bits(trace.outputs.get(AGAIN), trace.outputs.get("A"))
    return f", at {where}" if where else ""


def _other_bits(actual: torch.Tensor | None, expected: torch.Tensor | None) -> str:
    """Return where bits differ: -0.0 is another than 0.0, and a NaN may be the same."""
    if actual is None or expected is None or actual.shape != expected.shape:
        return ""
    if actual.dtype != expected.dtype:
        return ""
    here, there = (x.contiguous().unsqueeze(-1).view(torch.uint8) for x in (actual, expected))
    return describe_region((here != there).any(-1))


def _repeats(trace: Trace) -> bool:
    return trace.digests.get(AGAIN) == trace.digests.get("A")


def _on_gpu(trace: Trace) -> bool:
    return str(trace.facts.get("device", "cpu")).startswith("cuda")


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _logical(local: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the whole tensor that TP=1 holds: the local one without its padding."""
    if not isinstance(placement, Slices):
        return local
    whole = local.new_zeros(_logical_shape([local], [placement]))
    for here, there in placement.pieces:
        if whole[there].shape != local[here].shape:
            return local  # the placement itself is wrong, which the tiling says
        whole[there] = local[here]
    return whole


def _logical_shape(
    locals_: Sequence[torch.Tensor], placements: Sequence[Placement]
) -> tuple[int, ...]:
    """Return the shape the ranks' pieces claim, where TP=1 exposes no such tensor."""
    shape = list(locals_[0].shape)
    kind = placements[0]
    if isinstance(kind, Shard):
        shape[kind.dim] = sum(local.shape[kind.dim] for local in locals_)
    elif isinstance(kind, Slices):
        regions = [whole for p in placements if isinstance(p, Slices) for _, whole in p.pieces]
        for dim in range(len(shape)):
            stops = [region[dim].stop for region in regions if dim < len(region)]
            shape[dim] = max((stop for stop in stops if stop is not None), default=shape[dim])
    return tuple(shape)
