"""Activations and KV caches that a rank rounds with another scale than TP=1 does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.faults.planting import MANY_HEADS, Decoder, fault
from tpcheck.faults.quant_parts import ATTENTION, quantized
from tpcheck.quantization import Quantization

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

_PER_TOKEN = quantized(Quantization("int8", activations="token"))
_ROUNDED = "another scale rounds anew, as 16 bits do: their own errors cross steps of the grid too"
_WIDER = ("float16", "float32")
_COARSE = "e4m3 rounds either way, and bfloat16 itself is only 16 times finer"
_KV = {**MANY_HEADS, "quantization": Quantization("fp8", kv_cache="head")}


@fault(
    "NVIDIA/TransformerEngine#1647",
    "a token's scale is made of the features that a rank holds, not of all",
    needs=_PER_TOKEN,
    drift=("float32",),
    reason=_ROUNDED,
)
def token_scale_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    decoder.layers[0].mlp.down_proj.round_input.tp = None


@fault(
    "weicj/vLLM-2080Ti-Definitive#207",
    "ranks round with scales of their own and sum: their terms come in different units",
    needs=_PER_TOKEN,
)
def terms_in_units_of_each_rank(decoder: Decoder, tp: TPGroup) -> None:
    module = decoder.layers[0].mlp.down_proj
    rounding = module.round_input

    def rounded(x_f: torch.Tensor) -> torch.Tensor:
        own, shared = rounding.largest(x_f), tp.all_reduce(rounding.largest(x_f), op="max")
        rounding.tp = None
        terms: torch.Tensor = rounding(x_f) / own.to(x_f.dtype) * shared.to(x_f.dtype)
        return terms

    module.round_input = rounded


@fault(
    "vllm-project/compressed-tensors#394",
    "the scale is taken over tokens for each feature, where it is one per token",
    needs=_PER_TOKEN,
    drift=("float32",),
    reason=_ROUNDED,
)
def scale_over_tokens(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.numerics.grids import GRIDS
    from tpcheck.reference.rounding import on_grid, wide

    def rounded(x_BTD: torch.Tensor) -> torch.Tensor:
        largest_D = wide(x_BTD).abs().amax((0, 1))
        return on_grid(x_BTD, largest_D / GRIDS["int8"].max, "int8")

    for part in ("gate_proj", "up_proj"):
        getattr(decoder.layers[0].mlp, part).round_input = rounded


@fault(
    "ROCm/TransformerEngine#485",
    "the scale takes a group's largest to 240, the end of the other e4m3, not to 448",
    needs=quantized(Quantization("fp8", 8, activations="group")),
    drift=("float32",),
    reason=_ROUNDED,
)
def other_end_of_the_grid(decoder: Decoder, tp: TPGroup) -> None:
    rounding = decoder.layers[0].mlp.down_proj.round_input
    largest = rounding.largest
    rounding.largest = lambda x_f: largest(x_f) * (448 / 240)


@fault(
    "sgl-project/sglang#26436",
    "the loader takes the rank's number for a head: all of its heads share that one's scale",
    needs=_KV,
    drift=_WIDER,
    reason=_COARSE,
)
def kv_scale_of_the_rank(decoder: Decoder, tp: TPGroup) -> None:
    from tpcheck.reference.sources import GeneratedWeights

    attention, heads = decoder.layers[0].self_attn, decoder.spec.num_key_value_heads
    for part in "kv":
        name, held = f"{ATTENTION}.{part}_scale", len(getattr(attention, f"{part}_scale_k"))
        own = GeneratedWeights(tp).slice(name, (heads,), 0, tp.rank, tp.rank + 1)
        setattr(attention, f"{part}_scale_k", own.expand(held))


@fault(
    "vllm-project/vllm#42580",
    "the kernel reads one scale for all heads, the first that the rank holds",
    needs=_KV,
    drift=_WIDER,
    reason=_COARSE,
)
def kv_scale_of_the_first_head(decoder: Decoder, tp: TPGroup) -> None:
    attention = decoder.layers[0].self_attn
    for name in ("k_scale_k", "v_scale_k"):
        own = getattr(attention, name)
        setattr(attention, name, own[:1].expand(len(own)))


@fault(
    "neuralmagic/AutoFP8#25",
    "one scale is kept for keys and values: values are rounded with that of the keys",
    needs={"quantization": Quantization("fp8", kv_cache="tensor")},
    drift=_WIDER,
    reason=_COARSE,
)
def values_with_the_scale_of_keys(decoder: Decoder, tp: TPGroup) -> None:
    attention = decoder.layers[0].self_attn
    attention.v_scale_k = attention.k_scale_k
