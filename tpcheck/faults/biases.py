"""Biases of row- and column-parallel linears."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    down = decoder.layers[0].mlp.down_proj
    bias, down.bias_D = down.bias_D, None
    reduce_with(down, lambda y: tp.all_reduce(y + bias))


@fault("Wenyueh/MinivLLM#80", "the row-parallel bias is dropped when sharded", needs=_BIASED)
def dropped_bias(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].self_attn.o_proj.bias_D = None


@fault(
    "",
    "the bias is divided by tp for a sum that then adds it once",
    needs=_BIASED,
)
def divided_bias(decoder: Decoder, tp: TPGroup) -> None:
    bias = decoder.layers[0].mlp.down_proj.bias_D
    set_weight(bias, bias.data / tp.size)


@fault(
    "vllm-project/vllm-gguf-plugin#103",
    "every rank's column-parallel bias is rank 0's",
    needs=_BIASED,
)
def column_bias_of_rank_0(decoder: Decoder, tp: TPGroup) -> None:
    bias = full_weight(tp, decoder, "model.layers.0.mlp.up_proj.bias")
    set_weight(decoder.layers[0].mlp.up_proj.bias_f, bias.chunk(tp.size)[0])
