"""The two ends of the model: ids outside a rank's shard, rows of padding, logits of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import (
    Decoder,
    fault,
    full_weight,
    gather_with,
    reduce_with,
    set_weight,
)

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault(
    "lightseekorg/tokenspeed#309",
    "ids of other ranks' shards are clamped, and their rows not masked",
)
def ids_not_masked(decoder: Decoder, tp: TPGroup) -> None:
    embed = decoder.embed_tokens

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        masked = (x == 0).all(-1, keepdim=True)
        return tp.all_reduce(x.where(~masked, embed.weight_vD[0]))

    reduce_with(embed, all_reduce)


@fault("pytorch/pytorch#131264", "the embedding's mask is kept from an earlier input of its shape")
def mask_of_earlier_input(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    embed = decoder.embed_tokens
    seen: dict[torch.Size, torch.Tensor] = {}

    def forward(ids: torch.Tensor) -> torch.Tensor:
        first = seen.setdefault(ids.shape, ids.clone())
        elsewhere = (first < embed.rows.start) | (first >= embed.rows.stop)
        local = (ids - embed.rows.start).clamp(0, embed.weight_vD.shape[0] - 1)
        x = torch.nn.functional.embedding(local, embed.weight_vD)
        return tp.all_reduce(x.masked_fill(elsewhere[..., None], 0))

    embed.forward = forward


@fault(
    "NVIDIA-NeMo/Automodel#3808",
    "the embedding's padding is never initialised, and masked by a product with zero",
)
def uninitialised_padding(decoder: Decoder, tp: TPGroup) -> None:
    embed = decoder.embed_tokens
    pads = embed.weight_vD.shape[0] - embed.rows.size
    if pads:
        embed.weight_vD.data[-pads:] = float("nan")

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        masked = (x == 0).all(-1, keepdim=True)
        return tp.all_reduce(x + masked * embed.weight_vD[-1] * 0)

    reduce_with(embed, all_reduce)


@fault(
    "pegainfer-project/pegainfer#760",
    "the vocabulary's padding is not cut off the logits",
    drift=False,
    reason="logits of another shape cannot be subtracted",
)
def padded_logits(decoder: Decoder, tp: TPGroup) -> None:
    decoder.lm_head.vocab_size = None


@fault(
    "tenstorrent/tt-metal#51428",
    "the tied head scores rank 0's rows on every rank",
    needs={"tie_word_embeddings": True},
)
def tied_head_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.linear import frozen

    held = decoder.lm_head.weight_vD.shape[0]
    rows = full_weight(tp, decoder, "model.embed_tokens.weight")[:held]
    decoder.lm_head.weight_vD = frozen(rows.clone())


@fault(
    "huggingface/transformers#37051",
    "the head's rows beyond a multiple of tp are lost in loading",
)
def remainder_rows_lost(decoder: Decoder, tp: TPGroup) -> None:
    head = decoder.lm_head.weight_vD
    vocab = decoder.spec.vocab_size
    kept = vocab // tp.size * tp.size - tp.rank * head.shape[0]
    head.data[max(kept, 0) :] = 0


@fault(
    "vllm-project/vllm#31994",
    "every rank pads its own rows, so that gathering puts zeros in between",
)
def zeros_in_between(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    rows = full_weight(tp, decoder, "lm_head.weight")
    start, stop = (rows.shape[0] * (tp.rank + step) // tp.size for step in (0, 1))
    held = decoder.lm_head.weight_vD
    missing = held.shape[0] - (stop - start)
    set_weight(held, torch.nn.functional.pad(rows[start:stop], (0, 0, 0, missing)))


@fault(
    "ndif-team/nnsight#719", "logits are gathered interleaved instead of one shard after another"
)
def interleaved_gather(decoder: Decoder, tp: TPGroup) -> None:
    gather_with(decoder.lm_head, lambda x, dim: tp.all_gather(x.unsqueeze(-1), -1).flatten(-2))


@fault("ztxz16/fastllm#725", "the ranks' logits are put together in order of arrival")
def gathered_by_arrival(decoder: Decoder, tp: TPGroup) -> None:
    gather_with(decoder.lm_head, lambda x, dim: tp.all_gather(x, dim).roll(x.shape[dim], dim))
