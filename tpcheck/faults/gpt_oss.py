"""What gpt-oss adds and sharded paths get wrong: sinks, its fused experts, its router, its rope."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tpcheck.faults.planting import Decoder, fault, full_weight, set_weight

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup

_SINKS = {"attention_sinks": True}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "mlp_bias": True,
    "router_bias": True,
    "router_scoring": "topk_softmax",
    "swiglu_limit": 7.0,
}
_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
}
_YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
    }
}


@fault(
    "sgl-project/sglang#35092",
    "the sinks are handed over whole: every rank takes those of the first heads",
    needs=_SINKS,
)
def sinks_of_first_heads(decoder: Decoder, tp: TPGroup) -> None:
    held = decoder.layers[0].self_attn.sinks_h
    sinks = full_weight(tp, decoder, "model.layers.0.self_attn.sinks")
    set_weight(held, sinks[: len(held)])


@fault(
    "vllm-project/vllm#52156",
    "the sharded attention takes no sinks: they are dropped without a word",
    needs=_SINKS,
)
def sinks_dropped(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.self_attn.sinks_h = None


@fault(
    "vllm-project/vllm#27024",
    "gate and up lie feature by feature, and are cut as if one half were gate and the other up",
    needs=_EXPERTS,
)
def interleaved_experts_as_halves(decoder: Decoder, tp: TPGroup) -> None:
    import torch

    for index, expert in enumerate(decoder.layers[0].mlp.experts):
        for leaf, name in (("weight", "weight_fD"), ("bias", "bias_f")):
            prefix = f"model.layers.0.mlp.experts.{index}"
            pair = [
                full_weight(tp, decoder, f"{prefix}.{part}_proj.{leaf}") for part in ("gate", "up")
            ]
            halves = torch.stack(pair, dim=1).flatten(0, 1).chunk(2)
            for projection, half in zip((expert.gate_proj, expert.up_proj), halves, strict=True):
                set_weight(getattr(projection, name), half.chunk(tp.size)[tp.rank])


@fault(
    "pytorch/torchtitan#4154",
    "the router's bias is not reduced over the ranks: each adds its own",
    needs=_EXPERTS,
)
def router_bias_per_rank(decoder: Decoder, tp: TPGroup) -> None:
    bias = decoder.layers[0].mlp.gate.bias_E
    set_weight(bias, bias.data.roll(tp.rank, 0))


@fault(
    "NVIDIA/TensorRT-Model-Connect#399",
    "layer_types is not read: every layer attends to everything",
    needs=_LAYERS,
)
def layer_types_ignored(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, layer_types=(), sliding_window=0)


@fault(
    "NVIDIA/TensorRT-Model-Connect#400",
    "yarn is looked for under another name: the sharded path rotates without it",
    needs=_YARN,
)
def yarn_not_found(decoder: Decoder, tp: TPGroup) -> None:
    for layer in decoder.layers:
        layer.self_attn.spec = replace(decoder.spec, rope_scaling=None)
