"""Sums over ranks that are missing, doubled, averaged, or carry what they should not.

Those at the end travel in less than the activations' dtype (numerics/low_precision.py), which a
float64 run does not: what they lose is drift.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import Decoder, fault, gather_with, reduce_with

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup


@fault("vllm-project/tpu-inference#3435", "no all-reduce after the MLP of layer 0")
def missing_all_reduce(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].mlp.down_proj, lambda y: y)


@fault("vllm-project/vllm#49366", "the MLP of layer 0 is all-reduced twice")
def double_all_reduce(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].mlp.down_proj, lambda y: tp.all_reduce(tp.all_reduce(y)))


@fault("sgl-project/sglang#32963", "the attention output sums only half of the ranks")
def half_the_group(decoder: Decoder, tp: TPGroup) -> None:
    mine = tp.rank < (tp.size + 1) // 2
    o_proj = decoder.layers[0].self_attn.o_proj
    reduce_with(o_proj, lambda y: tp.all_reduce(y if mine else y * 0))


@fault("deepspeedai/DeepSpeed#2834", "the residual is added on every rank before the all-reduce")
def residual_before_reduce(decoder: Decoder, tp: TPGroup) -> None:
    layer, residual = decoder.layers[0], []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: residual.append(args))
    down = lambda y: tp.all_reduce(y + residual[-1][0]) - residual.pop()[0]  # noqa: E731
    reduce_with(layer.mlp.down_proj, down)


@fault(
    "sgl-project/sglang#35535", "a replicated term is added to the partials, so it counts tp times"
)
def replicated_term(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y + 0.01))


@fault("pytorch/pytorch#162692", "the mean over ranks is taken for the sum")
def average_for_sum(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[-1].mlp.down_proj, lambda y: tp.all_reduce(y, "avg"))


@fault("pytorch/pytorch#165962", "max over partials is taken for their sum")
def max_for_sum(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[-1].mlp.down_proj, lambda y: tp.all_reduce(y, "max"))


@fault(
    "mirage-project/mirage#722",
    "attention's residual is added on every rank before the all-reduce",
)
def attention_residual_before_reduce(decoder: Decoder, tp: TPGroup) -> None:
    layer = decoder.layers[-1]
    residual: list[torch.Tensor] = []
    layer.input_layernorm.register_forward_pre_hook(lambda _, args: residual.append(args[0]))

    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        x = residual.pop()
        return tp.all_reduce(y + x) - x

    reduce_with(layer.self_attn.o_proj, all_reduce)


@fault(
    "pytorch/pytorch#159856",
    "the ranks' norms are added up for the norm of the whole",
    needs={"qk_norm": "across_heads"},
)
def sum_of_norms(decoder: Decoder, tp: TPGroup) -> None:
    norm = decoder.layers[0].self_attn.q_norm
    reduce_with(norm, lambda squares: tp.all_reduce(squares.sqrt()).square())


@fault(
    "pytorch/pytorch#174536",
    "abs is taken of every partial: it looks linear where their signs agree",
)
def abs_of_partials(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.layers[0].self_attn.o_proj, lambda y: tp.all_reduce(y.abs()))


@fault("NVIDIA/Megatron-LM#7452", "logits that are gathered already are summed over the ranks")
def gathered_logits_summed(decoder: Decoder, tp: TPGroup) -> None:
    gather_with(decoder.lm_head, lambda x, dim: tp.all_reduce(tp.all_gather(x, dim)))


@fault("pytorch/torchtitan#3329", "an early return skips the embedding's all-reduce")
def embedding_not_reduced(decoder: Decoder, tp: TPGroup) -> None:
    reduce_with(decoder.embed_tokens, lambda x: x)


@fault(
    "NVIDIA/nccl#1950",
    "the last 8 elements of a message are not reduced",
    drift=("float16", "float32"),
    reason="8 elements of one token drown in what bfloat16 rounds of all others",
)
def tail_not_reduced(decoder: Decoder, tp: TPGroup) -> None:
    def all_reduce(y: torch.Tensor) -> torch.Tensor:
        whole = tp.all_reduce(y).clone().view(-1)
        whole[-8:] = y.reshape(-1)[-8:]
        return whole.view(y.shape)

    reduce_with(decoder.layers[0].mlp.down_proj, all_reduce)


@fault(
    "NVIDIA/TensorRT-LLM#3851",
    "partials travel as float8 where the activations' dtype was declared",
    "drift",
)
def float8_wire(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            reduce_with(module, lambda y: _over(tp, "fp8_wire", y))


@fault(
    "vllm-project/vllm#19744",
    "partials travel in blocks of int4 where a wide sum was declared",
    "drift",
    dtypes=("bfloat16", "float16"),
)
def int4_wire(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            reduce_with(module, lambda y: _over(tp, "int4_wire", y))


@fault(
    "sgl-project/sglang#34473",
    "bfloat16 partials above 65504 travel as float16, which does not saturate",
    "drift",
    dtypes=("bfloat16",),
)
def float16_wire_overflow(decoder: Decoder, tp: TPGroup) -> None:
    scale = 2.0**21  # the largest then are what gpt-oss has, 3e5
    reduce_with(
        decoder.layers[0].mlp.down_proj, lambda y: _over(tp, "fp16_wire", y * scale) / scale
    )


@fault(
    "sgl-project/sglang#40084",
    "blocks of int8 whose maximum is below 2e-3: float16 cannot hold the inverse of their scale",
    "drift",
    dtypes=("bfloat16",),
)
def small_blocks_shrink(decoder: Decoder, tp: TPGroup) -> None:
    scale = 2.0**-9  # blocks then have maxima of 1e-4 to 1e-3
    reduce_with(
        decoder.layers[0].mlp.down_proj, lambda y: _over(tp, "int8_wire", y * scale) / scale
    )


def _over(tp: TPGroup, kind: str, y: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks as a reduction of this kind does, whatever the group's own is."""
    from tpcheck.numerics.reduction import reduce_sum

    return reduce_sum(list(tp.all_gather(y[None], 0).unbind(0)), kind)
