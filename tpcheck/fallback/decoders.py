"""The reference decoder under a remedy: at TP=1 part by part, or with other products.

Requirement: at TP=1 it is the decoder's own code, built for a group of one and given the ranks'
weights, so its bits are those of the decoder built at TP=1. An embedding, half a decoder layer or
the head is a part; its weights go before the next part's come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tpcheck.fallback.cloning import cloned
from tpcheck.fallback.decoder_products import DecoderProducts, group_of_one
from tpcheck.fallback.gathering import Collectives, Meter, gathered_weight
from tpcheck.fallback.models import Forward, Products, WholeHead, no_rows_is_an_error
from tpcheck.reference.attention import Attention
from tpcheck.reference.decoder import Decoder
from tpcheck.reference.embedding import VocabParallelEmbedding, VocabParallelHead
from tpcheck.reference.mlp import MLP
from tpcheck.reference.moe import SparseMLP
from tpcheck.reference.norm import make_norm
from tpcheck.reference.weights import RankWeights
from tpcheck.shard_plan import make_shard_plan
from tpcheck.shard_plan.cuts import cut
from tpcheck.shard_plan.quant import quantized
from tpcheck.shard_plan.tensors import logical_tensors


class DecoderModel:
    """A reference decoder on this rank."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.group: Any = decoder.embed_tokens.tp
        self.tp: Collectives = self.group
        self.dtype: torch.dtype = decoder.embed_tokens.weight_vD.dtype
        self.device = decoder.embed_tokens.weight_vD.device
        self.name = decoder.spec.model_type or "decoder"

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits as deployed."""
        logits: torch.Tensor = self.decoder(input_ids)
        return logits

    def alone(self, meter: Meter, dtype: torch.dtype | None = None) -> Forward:
        """Return the forward at TP=1; see [Bytes Gathered] for what it costs."""
        return _Alone(self.decoder, meter, dtype or self.dtype)

    def with_products(self, products: Products, meter: Meter) -> Forward:
        """Return the decoder with its products made otherwise; experts' are row-parallel too."""
        with no_rows_is_an_error(self.name) as found:
            replace = DecoderProducts(self.decoder, products, meter, found)
            clone: Forward = cloned(self.decoder, replace)
        return clone

    def with_head(self, meter: Meter) -> Forward:
        """Return the decoder with a head that is whole, in float32."""

        def replace(_fqn: str, module: nn.Module) -> nn.Module | None:
            return WholeHead(self._whole_head(meter)) if module is self.decoder.lm_head else None

        clone: Forward = cloned(self.decoder, replace)
        return clone

    def _whole_head(self, meter: Meter) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        weights = _Gathered(self.decoder, meter, self.dtype)
        tied = self.decoder.spec.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"

        def gather() -> tuple[torch.Tensor, torch.Tensor | None]:
            with weights.part("lm_head", [name, "lm_head.bias"]):
                return weights.load(name), weights.load_optional("lm_head.bias")

        return gather


class _Gathered(RankWeights):
    """A decoder's weights, whole: what a rank of one would load, put together from the ranks."""

    def __init__(self, decoder: Decoder, meter: Meter, dtype: torch.dtype) -> None:
        self.solo = group_of_one(decoder, dtype)
        self.plan1 = make_shard_plan(decoder.spec, 1)
        nothing_to_read: Any = None  # everything comes from the ranks
        super().__init__(decoder.spec, self.plan1, self.solo, nothing_to_read)
        self._decoder, self._meter, self._dtype = decoder, meter, dtype
        self._tp: Any = decoder.embed_tokens.tp
        self._locals = decoder.shards()

    def load(self, name: str) -> torch.Tensor:
        """Return a whole weight in the compute dtype; all ranks ask for it together."""
        decoder, tensor = self._decoder, self._tensors[name]
        cuts = [
            cut(decoder.spec, decoder.plan, rank, tensor) for rank in range(decoder.plan.tp_size)
        ]
        local = self._local(name)
        shapes = [_resized(local.shape, part.dim, part.size) for part in cuts]
        if not tensor.split:
            shapes = [tuple(local.shape)] * len(cuts)
        placements = [part.placement for part in cuts]
        whole = gathered_weight(local, placements, shapes, tensor.shape, self._tp, self._meter)
        return whole.to(self._dtype)

    def part(self, what: str, names: Sequence[str]) -> Any:
        """Hold the whole weights of one part while open."""
        size = torch.empty((), dtype=self._dtype).element_size()
        shapes = [self._tensors[name].shape for name in names if name in self._tensors]
        return self._meter.holding(what, size * sum(math.prod(shape) for shape in shapes))

    def _local(self, name: str) -> torch.Tensor:
        """Return what this rank computes with: of a quantized weight the shards are its codes."""
        if not quantized(self._decoder.spec, name, self._tensors[name]):
            return self._locals[name][0]
        path, _, last = name.removeprefix("model.").removesuffix(".weight").rpartition(".")
        parent = self._decoder.get_submodule(path)
        module = getattr(parent, last, parent)  # an expert holds its down_proj itself
        named = dict(module.named_parameters(recurse=False))
        own = next(key for key in ("weight_fD", "weight_Df", "down_Df") if key in named)
        local: torch.Tensor = named[own].data
        return local


class _Alone:
    """ids [B, T] -> logits [B, T, V]: the decoder's forward, each part built in its turn."""

    def __init__(self, decoder: Decoder, meter: Meter, dtype: torch.dtype) -> None:
        self._spec = decoder.spec
        self._weights = _Gathered(decoder, meter, dtype)
        self._names = tuple(logical_tensors(decoder.spec))
        for what, names in self._parts():
            with self._weights.part(what, names):
                pass  # too small a bound is an error now, not at the first request

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        weights, spec = self._weights, self._spec
        plan, solo = weights.plan1, weights.solo
        with self._part("embed_tokens"):
            x_BTD = VocabParallelEmbedding(plan, weights, solo)(input_ids)
            if spec.position == "learned":
                positions_TD = weights.load("model.embed_positions.weight")
                x_BTD = x_BTD + positions_TD[: input_ids.shape[1]]
        mlp = SparseMLP if spec.num_experts else MLP
        for layer in range(spec.num_hidden_layers):
            name = f"model.layers.{layer}"
            with self._part(f"layers.{layer}.self_attn"):
                norm = make_norm(f"{name}.input_layernorm", spec, weights)
                x_BTD = x_BTD + Attention(layer, spec, plan, weights, solo)(norm(x_BTD))
            with self._part(f"layers.{layer}.mlp"):
                norm = make_norm(f"{name}.post_attention_layernorm", spec, weights)
                x_BTD = x_BTD + mlp(layer, spec, weights, solo)(norm(x_BTD))
        with self._part("lm_head"):
            norm = make_norm("model.norm", spec, weights)
            tied = spec.tie_word_embeddings
            name = "model.embed_tokens.weight" if tied else "lm_head.weight"
            head = VocabParallelHead(spec, weights.load(name), weights, solo)
            logits: torch.Tensor = head(norm(x_BTD))
        return logits

    def _part(self, what: str) -> Any:
        return self._weights.part(what, dict(self._parts())[what])

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the parts of the model with the weights that each needs, in order."""
        embeddings = ["model.embed_tokens.weight", "model.embed_positions.weight"]
        yield "embed_tokens", embeddings
        for layer in range(self._spec.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            of_layer = [name for name in self._names if name.startswith(prefix)]
            first = (f"{prefix}self_attn.", f"{prefix}input_layernorm.")
            attention = [name for name in of_layer if name.startswith(first)]
            yield f"layers.{layer}.self_attn", attention
            yield f"layers.{layer}.mlp", [name for name in of_layer if name not in attention]
        head = embeddings[:1] if self._spec.tie_word_embeddings else ["lm_head.weight"]
        yield "lm_head", [*head, "lm_head.bias", "model.norm.weight", "model.norm.bias"]


def _resized(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
