"""Every decision of a tensor-parallel split at one degree, before a weight moves.

Requirement: head, KV-group, FFN and vocabulary ranges are decided in the model's own vocabulary and
in integers only. Dividing tensor sizes instead goes wrong without an error: hidden_size=288 with
6 heads of 48 divides by 4, and four ranks then compute with heads of 72.

[Padding] The vocabulary is padded to a multiple of tp_size. Ranks hold equal row counts, the pads
lie behind the last real row, and they are cut off the gathered logits.
[KV Replication] With more ranks than KV heads, tp_size / num_key_value_heads neighbours hold a copy
of one KV head each, the one that their query heads attend with.

What else may be padded, copied or left uneven is a `SplitPolicy`. Read on: `policy` and `records`
are the words, `dividing` deals out, `rules` refuses, `planning` puts them together, `tensors` and
`cuts` say what that means for each weight, `costs` what it costs. Torch-free.
"""

from __future__ import annotations

from tpcheck.shard_plan.costs import Load, RankCost, costs, imbalance
from tpcheck.shard_plan.cuts import Cut, Run, cut, fused_cut, tensor_cuts
from tpcheck.shard_plan.planning import best_plan, legal_tp_sizes, make_shard_plan
from tpcheck.shard_plan.policy import STRICT, SplitPolicy
from tpcheck.shard_plan.quant import stored_cuts
from tpcheck.shard_plan.records import Padded, RankPlan, ShardPlan, Span
from tpcheck.shard_plan.tensors import LogicalTensor, logical_tensors

__all__ = [
    "STRICT",
    "Cut",
    "Load",
    "LogicalTensor",
    "Padded",
    "RankCost",
    "RankPlan",
    "Run",
    "ShardPlan",
    "Span",
    "SplitPolicy",
    "best_plan",
    "costs",
    "cut",
    "fused_cut",
    "imbalance",
    "legal_tp_sizes",
    "logical_tensors",
    "make_shard_plan",
    "stored_cuts",
    "tensor_cuts",
]
