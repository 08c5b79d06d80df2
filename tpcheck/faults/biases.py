"""Biases of row- and column-parallel linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, fault, full_weight, reduce_with, set_weight

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

_BIASED = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}


@fault(
    "huggingface/text-generation-inference#1036",
    "the row-parallel bias is added on every rank before the all-reduce",
    needs=_BIASED,
)
def double_bias(decoder: Decoder, tp: TPGroup) -> None:
    _bias_on_every_rank(decoder.layers[0].mlp.down_proj, tp)


@fault("Wenyueh/MinivLLM#80", "the row-parallel bias is dropped when sharded", needs=_BIASED)
def dropped_bias(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].self_attn.o_proj.bias_D = None


@fault(
    "PaddlePaddle/FastDeploy#5247",
    "a bias meant to be added on every rank is not divided by tp when it is loaded",
    needs=_BIASED,
)
def undivided_bias(decoder: Decoder, tp: TPGroup) -> None:
    _bias_on_every_rank(decoder.layers[-1].self_attn.o_proj, tp)


@fault(
    "awslabs/slapo#10",
    "the all-reduce is wrapped round every row-parallel linear, bias inside",
    needs=_BIASED,
)
def wrapped_linears(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        _bias_on_every_rank(layer.self_attn.o_proj, tp)
        _bias_on_every_rank(layer.mlp.down_proj, tp)


@fault(
    "vllm-project/vllm-gguf-plugin#103",
    "every rank's column-parallel bias is rank 0's",
    needs=_BIASED,
)
def column_bias_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    bias = full_weight(tp, decoder, "model.layers.0.mlp.up_proj.bias")
    set_weight(decoder.layers[0].mlp.up_proj.bias_f, bias.chunk(tp.size)[0])


@fault(
    "OpenNMT/CTranslate2#1708",
    "the query heads' bias is not sliced: every rank uses the first heads'",
    needs=_BIASED,
)
def bias_of_first_heads(decoder: Decoder, tp: TPGroup) -> None:
    bias = full_weight(tp, decoder, "model.layers.0.self_attn.q_proj.bias")
    held = decoder.layers[0].self_attn.q_proj.bias_f
    set_weight(held, bias[: held.shape[0]])


@fault(
    "vllm-project/vllm#20843",
    "the head's bias is padded to a multiple of 64, its weight to a multiple of tp",
    needs={"lm_head_bias": True},
)
def bias_padded_otherwise(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    bias = full_weight(tp, decoder, "lm_head.bias")
    multiple = 64 * tp.size
    padded = torch.nn.functional.pad(bias, (0, -bias.shape[0] % multiple))
    held = decoder.lm_head.bias_v
    set_weight(held, padded.chunk(tp.size)[tp.rank][: held.shape[0]])


def _bias_on_every_rank(row: Any, tp: TPGroup) -> None:
    bias, row.bias_D = row.bias_D, None
    reduce_with(row, lambda y: tp.all_reduce(y + bias))
