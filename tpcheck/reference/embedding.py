"""The two ends of the decoder, split by vocabulary: the embedding and the head.

Requirement: a vocabulary that does not divide is padded (shard_plan: [Padding]), and whatever the
pad rows hold, NaN included, reaches no logit: the embedding masks by selection, never by a
product with zero, and the head cuts the pads off after the gather.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.linear import frozen
from tpcheck.reference.weights import RankWeights
from tpcheck.shard_plan import ShardPlan
from tpcheck.spec import ModelSpec


class VocabParallelEmbedding(nn.Module):
    """ids [B, T] -> x [B, T, D]: each id's row comes from the one rank that holds it."""

    def __init__(self, plan: ShardPlan, weights: RankWeights, tp: TPGroup) -> None:
        super().__init__()
        self.tp = tp
        self.rows = plan.ranks[tp.rank].vocab
        self.weight_vD = frozen(weights.load("model.embed_tokens.weight"))

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the whole embedding, equal on every rank."""
        elsewhere = (ids_BT < self.rows.start) | (ids_BT >= self.rows.stop)
        local_ids = (ids_BT - self.rows.start).masked_fill(elsewhere, 0)
        x_BTD = functional.embedding(local_ids, self.weight_vD)
        x_BTD_partial = x_BTD.masked_fill(elsewhere[..., None], 0)
        return self.tp.all_reduce(x_BTD_partial)


class VocabParallelHead(nn.Module):
    """x [B, T, D] -> logits [B, T, V]: every rank scores its rows, all gather them."""

    def __init__(
        self, spec: ModelSpec, weight_vD: torch.Tensor, weights: RankWeights, tp: TPGroup
    ) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = spec.vocab_size
        self.weight_vD = frozen(weight_vD)
        bias_v = weights.load_optional("lm_head.bias")
        self.bias_v = None if bias_v is None else frozen(bias_v)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return all logits, equal on every rank, without the vocabulary's padding."""
        logits_BTv = functional.linear(x_BTD, self.weight_vD, self.bias_v)
        return self.tp.all_gather(logits_BTv, dim=-1)[..., : self.vocab_size]
