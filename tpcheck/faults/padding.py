"""Padding, vocabulary and norms over split dims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, full_weight, reduce_with

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault(
    "ByteDance-Seed/VeOmni#1139",
    "the last FFN column of the last rank is never read",
    drift=False,
    reason="one column of a wide FFN can stay below bfloat16's rounding",
)
def dropped_column(decoder: Decoder, tp: TPGroup) -> None:
    if tp.rank == tp.size - 1:
        decoder.layers[0].mlp.down_proj.weight_Df.data[:, -1] = 0


@fault(
    "pegainfer-project/pegainfer#760",
    "the vocabulary's padding is not cut off the logits",
    drift=False,
    reason="logits of another shape cannot be subtracted",
)
def padded_logits(decoder: Decoder, tp: TPGroup) -> None:
    decoder.lm_head.vocab_size = None


@fault("vllm-project/vllm#41972", "memory that nobody wrote reaches the residual stream")
def uninitialised_operand(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].mlp.down_proj, lambda y: tp.all_reduce(y + y.new_full((), 1e4)))


@fault("", "the embedding masks one row too few")
def embedding_row_shared(decoder: Decoder, tp: TPGroup) -> None:
    embed = decoder.embed_tokens
    real = tp.all_reduce

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        return real(x + 0.05 * embed.weight_vD[0])

    reduce_with(embed, all_reduce)


@fault(
    "tenstorrent/tt-metal#51428",
    "the tied head scores rank 0's rows on every rank",
    needs={"tie_word_embeddings": True},
)
def tied_head_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    rows = full_weight(tp, decoder, "model.embed_tokens.weight")[
        : decoder.lm_head.weight_vD.shape[0]
    ]
    from tpcheck.reference.linear import frozen

    held = decoder.lm_head.weight_vD.shape[0]
    decoder.lm_head.weight_vD = frozen(rows[:held].clone())


@fault(
    "EleutherAI/gpt-neox#1424",
    "the norm across heads takes its statistic over the rank's own heads",
    needs={"qk_norm": "across_heads"},
    drift=False,
    reason="at TP=2 the two halves' statistics are close: twice TP=1's error",
)
def local_norm(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    norm.full_size //= tp.size
    reduce_with(norm, lambda squares: squares)


@fault(
    "",
    "the sharded path builds its norms with eps 1e-5 for 1e-6",
    drift=False,
    reason="moves logits by 1e-6 relative, far below bfloat16's rounding",
)
def norm_eps(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5
