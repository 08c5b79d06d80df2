"""The reference decoder at TP=1 with one layer's weights in memory at a time.

Requirement: what is computed is the decoder's own code (decoder, attention, mlp, moe, embedding);
here stands only when weights are read and that nothing keeps them. A layer is made from its source
when it runs, an expert when tokens come to it (moe: LateExpert), of the embedding only the rows
of the ids are read, of the head HEAD_ROWS at a time, which is how the whole one multiplies too
(embedding: [Head Steps]). So the bits are those of the decoder that holds everything.

Shape legend: B batch, T tokens, D hidden, V vocab, U different ids, s rows of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from tpcheck.groups.base import TPGroup
from tpcheck.reference.cache import Cache
from tpcheck.reference.decoder import Decoder, DecoderLayer
from tpcheck.reference.embedding import VocabParallelEmbedding, VocabParallelHead
from tpcheck.reference.norm import make_norm
from tpcheck.reference.sources import Weights
from tpcheck.reference.weights import RankWeights
from tpcheck.shard_plan import ShardPlan, make_shard_plan
from tpcheck.spec import ModelSpec

EMBEDDING, POSITIONS, HEAD = (
    "model.embed_tokens.weight",
    "model.embed_positions.weight",
    "lm_head.weight",
)


class TransientWeights(RankWeights):
    """The weights of a rank of one, each read when it is asked for and kept by nobody here."""

    late = True

    def load(self, name: str) -> torch.Tensor:
        """Return a whole weight; unlike the others' it is not noted as a shard."""
        whole = super().load(name)
        self.shards.clear()
        return whole

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows of a weight that is not quantized, as `load` would hold them."""
        shape = self._tensors[name].shape
        return self._source.slice(name, shape, 0, start, stop).contiguous()

    def has(self, name: str) -> bool:
        """Return whether the spec has this weight."""
        return name in self._tensors


class TransientLayer(nn.Module):
    """A decoder layer that is made for a call, or for several by `make`."""

    def __init__(
        self, layer: int, spec: ModelSpec, plan: ShardPlan, weights: RankWeights, tp: TPGroup
    ) -> None:
        super().__init__()
        self._needs = layer, spec, plan, weights, tp

    def make(self) -> DecoderLayer:
        """Read the layer's weights; they go with what is returned."""
        return DecoderLayer(*self._needs)

    def forward(self, x_BTD: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Return the residual stream after this layer."""
        return self.make()(x_BTD, cache=cache)  # type: ignore[no-any-return]


class _Embedding(VocabParallelEmbedding):
    """ids [B, T] -> x [B, T, D]; reads the rows of the ids that there are, each once."""

    def __init__(self, plan: ShardPlan, weights: TransientWeights, tp: TPGroup) -> None:
        nn.Module.__init__(self)
        self.tp = tp
        self.rows = plan.ranks[0].vocab
        self._weights = weights

    def look_up(self, local_ids_BT: torch.Tensor) -> torch.Tensor:
        ids_U, places_BT = local_ids_BT.unique(return_inverse=True)
        read = [self._weights.rows(EMBEDDING, row, row + 1) for row in ids_U.tolist()]
        table_UD = torch.cat(read) if read else self._weights.rows(EMBEDDING, 0, 0)
        return functional.embedding(places_BT, table_UD)


class _Head(VocabParallelHead):
    """x [B, T, D] -> logits [B, T, V]; reads the rows of one step at a time."""

    def __init__(self, spec: ModelSpec, weights: TransientWeights, tp: TPGroup) -> None:
        nn.Module.__init__(self)
        self.tp = tp
        self.vocab_size = spec.vocab_size
        self._name = EMBEDDING if spec.tie_word_embeddings else HEAD
        self._weights = weights

    def local_rows(self) -> int:
        return self.vocab_size

    def step(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight_sD = self._weights.rows(self._name, start, stop)
        if not self._weights.has("lm_head.bias"):
            return weight_sD, None
        return weight_sD, self._weights.rows("lm_head.bias", start, stop)


class TransientDecoder(Decoder):
    """ids [B, T] -> logits [B, T, V], with no more than one layer's weights in memory.

    `embed`, `layer` and `scores` are its steps, for those who bring several inputs or go on after
    an interruption. It has no trace points, and holds no shards.
    """

    def __init__(self, spec: ModelSpec, tp: TPGroup, source: Weights) -> None:
        nn.Module.__init__(self)
        assert tp.size == 1, "a layer is read whole"
        self.spec, self.plan = spec, make_shard_plan(spec, 1)
        self._weights = weights = TransientWeights(spec, self.plan, tp, source)
        self.embed_tokens = _Embedding(self.plan, weights, tp)
        self.layers = nn.ModuleList(
            TransientLayer(layer, spec, self.plan, weights, tp)
            for layer in range(spec.num_hidden_layers)
        )
        self.norm = make_norm("model.norm", spec, weights)
        self.lm_head = _Head(spec, weights, tp)
        self.positions_TD = None
        self.trace_points = {}
        self._shards = {}

    def layer(self, index: int) -> DecoderLayer:
        """Read a layer; its weights go with what is returned."""
        one = self.layers[index]
        assert isinstance(one, TransientLayer)
        return one.make()

    def learned_positions(self, start: int, stop: int) -> torch.Tensor | None:
        """Return what is added to tokens at these positions; None where nothing is."""
        if not self._weights.has(POSITIONS):
            return None
        return self._weights.rows(POSITIONS, start, stop)

    def scores(self, xs_BTD: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the logits [B, T, V] of several inputs; the head is read once for all of them."""
        return self.lm_head.scores([self.norm(x_BTD) for x_BTD in xs_BTD])
