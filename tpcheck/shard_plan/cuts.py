"""Which slice of which tensor a rank holds: whole indices, local indices, and pads.

Requirement: weights, activations and fused tensors are cut by the same numbers. A rank's pads lie
behind its real indices, so that what is real is one slice from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpcheck.placement import Placement, Region, Replicate, Shard, Slices
from tpcheck.shard_plan.records import ShardPlan, Span
from tpcheck.shard_plan.tensors import LogicalTensor, logical_tensors
from tpcheck.spec import ModelSpec


class Run(NamedTuple):
    """Local indices that hold whole ones, of equal count."""

    local: Span
    whole: Span


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a tensor: `runs` of `dim`, in a local dim of `size`."""

    dim: int
    runs: tuple[Run, ...]
    size: int
    placement: Placement

    @property
    def span(self) -> Span:
        """From the first to behind the last whole index held."""
        return Span(self.runs[0].whole.start, self.runs[-1].whole.stop)

    @property
    def real(self) -> int:
        """How many local indices are real; they come first."""
        return self.runs[-1].local.stop

    @property
    def pads(self) -> int:
        """How many zero rows lie behind the real ones."""
        return self.size - self.real


def tensor_cuts(spec: ModelSpec, plan: ShardPlan) -> dict[str, tuple[Cut, ...]]:
    """Return every rank's part of every weight, by the weight's name."""
    tensors = logical_tensors(spec)
    kinds = {  # layers are alike: each kind is cut once
        tensor: tuple(cut(spec, plan, rank, tensor) for rank in range(plan.tp_size))
        for tensor in set(tensors.values())
    }
    return {name: kinds[tensor] for name, tensor in tensors.items()}


def cut(spec: ModelSpec, plan: ShardPlan, rank: int, tensor: LogicalTensor) -> Cut:
    """Return which part of a tensor `rank` holds, and the placement that says so."""
    if not tensor.split:
        whole = Span(0, tensor.shape[0])
        return Cut(0, (Run(whole, whole),), whole.size, Replicate())
    runs, size = _held_features(spec, plan, rank, tensor.split, unit_of(spec, tensor))
    if is_even(spec, plan, tensor.split):
        return Cut(tensor.dim, runs, size, Shard(tensor.dim))
    held = [run for run in runs if run.whole.size]
    return Cut(tensor.dim, runs, size, slices_of(tensor.dim, held))


def fused_cut(spec: ModelSpec, plan: ShardPlan, rank: int, parts: Sequence[LogicalTensor]) -> Cut:
    """Return which part of several tensors fused along their split dim `rank` holds.

    A rank holds its part of each, one behind the other: of [q; k; v] its query heads, then its
    keys, then its values; of [gate; up] its gate features, then the same of up. Cutting the fused
    tensor as if it were one gives rank 0 all of the first part.

    Returns:
        A cut whose pads may lie between its runs: `placement` says where, `real` does not.
    """
    dim, local, whole = parts[0].dim, 0, 0
    runs: list[Run] = []
    for part in parts:
        one = cut(spec, plan, rank, part)
        runs += [Run(moved(run.local, local), moved(run.whole, whole)) for run in one.runs]
        local, whole = local + one.size, whole + part.shape[dim]
    return Cut(dim, tuple(runs), local, slices_of(dim, [run for run in runs if run.whole.size]))


def activation_placement(
    spec: ModelSpec, plan: ShardPlan, rank: int, split: str, dim: int, unit: int = 1
) -> Placement:
    """Return how a dim of `split` features lies on the ranks.

    Args:
        unit: features per index of `dim`; head_dim where it counts heads.
    """
    if is_even(spec, plan, split):
        return Shard(dim)
    runs, _ = _held_features(spec, plan, rank, split, features_of(spec, split))
    return slices_of(dim, [Run(_over(local, unit), _over(whole, unit)) for local, whole in runs])


def local_size(spec: ModelSpec, plan: ShardPlan, rank: int, split: str) -> int:
    """Return how many heads, features or rows a rank has, copies and pads included."""
    if split == "vocab":
        return plan.vocab_rows
    padded: int = getattr(plan.padded, split)
    held = held_heads(spec, plan, rank) if split == "kv" else range(*_span(plan, rank, split))
    return padded or len(held)


def unit_of(spec: ModelSpec, tensor: LogicalTensor) -> int:
    """Return how many indices of its split dim a tensor has per head or feature: sinks have one."""
    return tensor.shape[tensor.dim] // _total(spec, tensor.split)


def features_of(spec: ModelSpec, split: str) -> int:
    """Return how many features or rows one of a `split` has: a head's, or one."""
    return spec.head_dim if split in ("query", "kv") else 1


def is_even(spec: ModelSpec, plan: ShardPlan, split: str) -> bool:
    """Whether ranks hold equally many of a `split`, and each of them once, without pads."""
    total = _total(spec, split)
    if split == "vocab":
        return plan.padded_vocab_size == total
    return all(
        local_size(spec, plan, rank, split) * plan.tp_size == total for rank in range(plan.tp_size)
    )


def held_heads(spec: ModelSpec, plan: ShardPlan, rank: int) -> tuple[int, ...]:
    """Return the KV head in each of a rank's places, pads left out."""
    mine = plan.ranks[rank]
    if plan.policy.kv != "mha":
        return tuple(range(*mine.kv_heads))
    group = spec.num_attention_heads // spec.num_key_value_heads
    return tuple(head // group for head in range(*mine.query_heads))


def attended_places(spec: ModelSpec, plan: ShardPlan, rank: int) -> tuple[int, ...]:
    """Return the place among a rank's KV heads that each of its query heads attends with.

    Padded query heads have one too, a padded KV head where there is one.
    """
    mine, places = plan.ranks[rank], local_size(spec, plan, rank, "kv")
    if plan.policy.kv == "mha":
        return tuple(range(places))
    group = spec.num_attention_heads // spec.num_key_value_heads
    real = [head // group - mine.kv_heads.start for head in range(*mine.query_heads)]
    return (*real, *[places - 1] * (local_size(spec, plan, rank, "query") - len(real)))


def counted_places(spec: ModelSpec, plan: ShardPlan, rank: int, split: str) -> tuple[int, ...]:
    """Return the places of a rank's heads that a sum over all ranks' heads counts here.

    Each real head counts once: where it is held first. Pads never count.
    """
    if split == "query":
        return tuple(range(plan.ranks[rank].query_heads.size))
    seen = set(range(max((other.kv_heads.stop for other in plan.ranks[:rank]), default=0)))
    counted = []
    for place, head in enumerate(held_heads(spec, plan, rank)):
        if head not in seen:
            counted.append(place)
            seen.add(head)
    return tuple(counted)


def _held_features(
    spec: ModelSpec, plan: ShardPlan, rank: int, split: str, unit: int
) -> tuple[tuple[Run, ...], int]:
    """Return the runs of a rank, and the local size, in `unit` indices per head or feature."""
    span = _span(plan, rank, split)
    wholes = [span]
    if split == "kv":
        wholes = _joined(held_heads(spec, plan, rank)) or wholes
    runs, at = [], 0
    for whole in wholes:
        local = Span(at, at + whole.size)
        runs.append(Run(_times(local, unit), _times(whole, unit)))
        at = local.stop
    return tuple(runs), local_size(spec, plan, rank, split) * unit


def _joined(heads: Iterable[int]) -> list[Span]:
    """Return ascending heads as spans; a head that comes again begins a new one."""
    spans: list[Span] = []
    for head in heads:
        if spans and spans[-1].stop == head:
            spans[-1] = Span(spans[-1].start, head + 1)
        else:
            spans.append(Span(head, head + 1))
    return spans


_FIELDS = {"query": "query_heads", "kv": "kv_heads"}


def _span(plan: ShardPlan, rank: int, split: str) -> Span:
    span: Span = getattr(plan.ranks[rank], _FIELDS.get(split, split))
    return span


_TOTALS = {
    "query": "num_attention_heads",
    "kv": "num_key_value_heads",
    "vocab": "vocab_size",
    "intermediate": "intermediate_size",
    "moe_intermediate": "moe_intermediate_size",
    "shared_expert_intermediate": "shared_expert_intermediate_size",
}


def _total(spec: ModelSpec, split: str) -> int:
    total: int = getattr(spec, _TOTALS[split])
    return total


def slices_of(dim: int, runs: Iterable[Run]) -> Slices:
    """Return the placement that says where runs along `dim` lie."""
    before: Region = (slice(None),) * dim
    return Slices([((*before, slice(*run.local)), (*before, slice(*run.whole))) for run in runs])


def moved(span: Span, by: int) -> Span:
    """Return a span that begins `by` indices later."""
    return Span(span.start + by, span.stop + by)


def _times(span: Span, unit: int) -> Span:
    return Span(span.start * unit, span.stop * unit)


def _over(span: Span, unit: int) -> Span:
    return Span(span.start // unit, span.stop // unit)
