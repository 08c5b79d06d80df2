"""The two ends of the decoder, split by vocabulary: the embedding and the head.

Requirement: a vocabulary that does not divide is padded (shard_plan: [Padding]), and whatever the
pad rows hold, NaN included, reaches no logit: the embedding masks by selection, never by a
product with zero, and the head cuts the pads off after the gather.

[Head Steps] The head multiplies HEAD_ROWS rows of the vocabulary at a time, whether it holds them
all or reads them one step at a time (transient): how a product is cut into blocks moves its last
bits, in float32 and float64 even between 64 rows and 131, so both have to cut alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.linear import frozen
from tpcheck.reference.weights import RankWeights
from tpcheck.shard_plan import ShardPlan
from tpcheck.spec import ModelSpec

HEAD_ROWS = 4096
"""Rows of the vocabulary in one product of the head."""


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
        x_BTD = self.look_up(local_ids)
        x_BTD_partial = x_BTD.masked_fill(elsewhere[..., None], 0)
        return self.tp.all_reduce(x_BTD_partial)

    def look_up(self, local_ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the rows of these ids, which count from the rank's first."""
        return functional.embedding(local_ids_BT, self.weight_vD)


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
        (logits_BTv,) = self.scores([x_BTD])
        return self.tp.all_gather(logits_BTv, dim=-1)[..., : self.vocab_size]

    def scores(self, xs_BTD: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's scores [B, T, v] of each input; see [Head Steps]."""
        rows = self.local_rows()
        if rows <= HEAD_ROWS:
            weight_vD, bias_v = self.step(0, rows)
            return [functional.linear(x_BTD, weight_vD, bias_v) for x_BTD in xs_BTD]
        scores_BTv = [x_BTD.new_empty(*x_BTD.shape[:-1], rows) for x_BTD in xs_BTD]
        for start in range(0, rows, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, rows)
            weight_sD, bias_s = self.step(start, stop)
            for x_BTD, to_BTv in zip(xs_BTD, scores_BTv, strict=True):
                to_BTv[..., start:stop] = functional.linear(x_BTD, weight_sD, bias_s)
        return scores_BTv

    def local_rows(self) -> int:
        """Return how many rows of the vocabulary this rank scores, pads included."""
        return len(self.weight_vD)

    def step(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return some of this rank's rows, and their biases."""
        if (start, stop) == (0, self.local_rows()):
            return self.weight_vD, self.bias_v
        bias_v = self.bias_v
        return self.weight_vD[start:stop], None if bias_v is None else bias_v[start:stop]
