"""What a plan costs each rank: parameters, bytes, operations; and how unevenly.

Requirement: a rank waits for the slowest, so the worst counts and not the mean; pads and copies are
computed and held like everything else, so they count too. Integers only: ratios are fractions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from tpcheck.errors import PlanError
from tpcheck.shard_plan.cuts import local_size, unit_of
from tpcheck.shard_plan.records import ShardPlan
from tpcheck.shard_plan.tensors import LogicalTensor, logical_tensors
from tpcheck.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Load:
    """How much of one `split` every rank computes with, pads included, and how much is real."""

    split: str
    per_rank: tuple[int, ...]
    real: int

    @property
    def slowest_over_mean(self) -> Fraction:
        """By how much the busiest rank exceeds the mean of all."""
        return Fraction(max(self.per_rank) * len(self.per_rank), sum(self.per_rank))

    @property
    def padding(self) -> Fraction:
        """What all ranks compute, over what they would without pads."""
        return Fraction(sum(self.per_rank), self.real)


@dataclass(frozen=True, slots=True)
class RankCost:
    """What one rank holds and does. `flops` counts a multiplication and an addition as two."""

    parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    flops: int


def imbalance(plan: ShardPlan) -> tuple[Load, ...]:
    """Return the loads that a degree splits, those of the vocabulary last.

    KV heads are left out: copies of them are held on purpose, and `costs` counts their bytes.
    """
    fields = {
        "query": "query_heads",
        "intermediate": "intermediate",
        "moe_intermediate": "moe_intermediate",
        "shared_expert_intermediate": "shared_expert_intermediate",
    }
    loads = []
    for split, field in fields.items():
        held = [getattr(rank, field).size for rank in plan.ranks]
        padded = getattr(plan.padded, split)
        if sum(held):
            loads.append(Load(split, tuple(padded or size for size in held), sum(held)))
    rows = sum(rank.vocab.size for rank in plan.ranks)
    return (*loads, Load("vocab", (plan.vocab_rows,) * plan.tp_size, rows))


def costs(
    spec: ModelSpec,
    plan: ShardPlan,
    *,
    batch: int = 1,
    seq_len: int = 1,
    weight_bits: int = 16,
    kv_bits: int = 16,
) -> tuple[RankCost, ...]:
    """Return what every rank holds, and does in one forward of batch * seq_len tokens.

    Args:
        seq_len: tokens of every row; the KV cache keeps all of them.
        weight_bits: of one parameter, without the scales of a quantization.
        kv_bits: of one element of the KV cache.

    Returns:
        One cost per rank. Operations are those of matrix products: projections, experts that a
        token chooses, router, logits, and attention over the whole square of tokens, as the
        reference decoder does it.

    Raises:
        PlanError: an argument is no whole number of at least 1.
    """
    given = {"batch": batch, "seq_len": seq_len, "weight_bits": weight_bits, "kv_bits": kv_bits}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PlanError(f"costs: {name}={value!r}, but should be a whole number of at least 1")
    kinds = _kinds(spec)
    found = []
    for rank in range(plan.tp_size):
        held = [
            (way, _elements(spec, plan, rank, tensor) * count)
            for (tensor, way), count in kinds.items()
        ]
        parameters = sum(elements for _, elements in held)
        cached = 2 * local_size(spec, plan, rank, "kv") * spec.head_dim * spec.num_hidden_layers
        found.append(
            RankCost(
                parameters=parameters,
                weight_bytes=-(-parameters * weight_bits // 8),
                kv_cache_bytes=-(-cached * batch * seq_len * kv_bits // 8),
                flops=_flops(spec, plan, rank, held, batch * seq_len, seq_len),
            )
        )
    return tuple(found)


_Kinds = Counter[tuple[LogicalTensor, str]]


def _kinds(spec: ModelSpec) -> _Kinds:
    """Count equal tensors, by whether tokens are multiplied with "all", "chosen" or "none".

    A spec of one layer is looked at, because a deep one has tens of thousands of tensors.
    """
    kinds: _Kinds = Counter()
    for name, tensor in logical_tensors(replace(spec, num_hidden_layers=1)).items():
        layers = spec.num_hidden_layers if name.startswith("model.layers.") else 1
        product = len(tensor.shape) == 2 and not name.startswith("model.embed_")
        way = "chosen" if ".experts." in name else "all"
        kinds[tensor, way if product else "none"] += layers
    return kinds


def _elements(spec: ModelSpec, plan: ShardPlan, rank: int, tensor: LogicalTensor) -> int:
    if not tensor.split:
        return math.prod(tensor.shape)
    per_index = math.prod(tensor.shape) // tensor.shape[tensor.dim]
    return per_index * local_size(spec, plan, rank, tensor.split) * unit_of(spec, tensor)


def _flops(
    spec: ModelSpec,
    plan: ShardPlan,
    rank: int,
    held: Sequence[tuple[str, int]],
    tokens: int,
    seq_len: int,
) -> int:
    per_token = sum(elements for way, elements in held if way == "all")
    if spec.num_experts:
        routed = sum(elements for way, elements in held if way == "chosen")
        per_token += routed // spec.num_experts * spec.num_experts_per_tok
    if spec.tie_word_embeddings:
        per_token += plan.vocab_rows * spec.hidden_size
    width = local_size(spec, plan, rank, "query") * spec.head_dim
    scores = 2 * width * seq_len * spec.num_hidden_layers
    return 2 * (per_token + scores) * tokens
