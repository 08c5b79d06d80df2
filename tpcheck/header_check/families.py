"""The tensors of model families: names as checkpoints spell them, dims as the config says.

Requirement: a table, not code: each row is a tensor and its dims in symbols, so that what is known
of a family can be read and a family be added in lines. A family that is not here is not guessed.

Symbols: D hidden, V vocabulary, Q query heads, K key heads, U value heads (of a KV head), O the
attention's output (query heads of the value width), I dense width, E expert width, S shared
experts' width, N experts, X positions, h one head, 1 one; W gate and up interleaved; for compressed
attention A the query's rank, B query heads of both kinds, C the KV rank, R the KV rank with rope, P
query heads of no-rope and value width; H query heads, one element each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcheck.engines.facts import Facts
from tpcheck.header_check.dimensions import Block

Config = Mapping[str, Any]
Rows = Mapping[str, str]

_LLAMA_ATTENTION = {
    "self_attn.q_proj.weight": "Q D",
    "self_attn.k_proj.weight": "K D",
    "self_attn.v_proj.weight": "U D",
    "self_attn.o_proj.weight": "D O",
}
_NORMS = {"input_layernorm.weight": "D", "post_attention_layernorm.weight": "D"}
_GATED = {"gate_proj.weight": "{0} D", "up_proj.weight": "{0} D", "down_proj.weight": "D {0}"}
_QK_NORM = {"self_attn.q_norm.weight": "h", "self_attn.k_norm.weight": "h"}


def _gated(prefix: str, width: str) -> dict[str, str]:
    return {f"{prefix}.{name}": dims.format(width) for name, dims in _GATED.items()}


_MLP = _gated("mlp", "I")
_ROUTER = {"mlp.gate.weight": "N D"}
_EACH_EXPERT = {**_ROUTER, **_gated("mlp.experts.{e}", "E")}
_FUSED_EXPERTS = {
    **_ROUTER,
    "mlp.experts.gate_up_proj": "N E+E D",
    "mlp.experts.down_proj": "N D E",
}
_MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate.weight": "N D",
    "block_sparse_moe.experts.{e}.w1.weight": "E D",
    "block_sparse_moe.experts.{e}.w2.weight": "D E",
    "block_sparse_moe.experts.{e}.w3.weight": "E D",
}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QKVO = (*_QKV, "self_attn.o_proj")


@dataclass(frozen=True, slots=True)
class Family:
    """One family's tensors. `layer` rows are each layer's, `dense` and `sparse` their MLPs.

    `biases` says which modules have one; `tied` what Hugging Face assumes where the config does not
    say; `sparse` may have several spellings, told apart by a name that only one of them has.
    """

    prefix: str = "model."
    layers: str = "model.layers.{i}."
    outside: Rows = field(
        default_factory=lambda: {"model.embed_tokens.weight": "V D", "model.norm.weight": "D"}
    )
    head: Rows = field(default_factory=lambda: {"lm_head.weight": "V D"})
    layer: Rows = field(default_factory=lambda: {**_LLAMA_ATTENTION, **_NORMS})
    dense: Rows = field(default_factory=lambda: _MLP)
    sparse: tuple[Rows, ...] = ()
    biases: Callable[[Config], tuple[str, ...]] = lambda config: ()
    tied: bool = False
    conv1d: bool = False
    optional_prefix: str = ""
    position_offset: int = 0


def _if_set(name: str, default: bool, modules: tuple[str, ...]) -> Callable[[Config], Any]:
    def biases(config: Config) -> tuple[str, ...]:
        value = config.get(name)
        return modules if (default if value is None else value) else ()

    return biases


def _llama_biases(config: Config) -> tuple[str, ...]:
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return (
        *(_QKVO if config.get("attention_bias") else ()),
        *(mlp if config.get("mlp_bias") else ()),
    )


_GPT2 = Family(
    prefix="",
    layers="transformer.h.{i}.",
    outside={
        "transformer.wte.weight": "V D",
        "transformer.wpe.weight": "X D",
        "transformer.ln_f.weight": "D",
    },
    layer={
        "ln_1.weight": "D",
        "ln_2.weight": "D",
        "attn.c_attn.weight": "D Q+K+U",
        "attn.c_proj.weight": "O D",
        "mlp.c_fc.weight": "D I",
        "mlp.c_proj.weight": "I D",
    },
    dense={},
    biases=lambda config: (
        *("ln_f", "ln_1", "ln_2"),
        *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    tied=True,
    conv1d=True,
    optional_prefix="transformer.",
)
_OPT = Family(
    prefix="model.decoder.",
    layers="model.decoder.layers.{i}.",
    outside={
        "model.decoder.embed_tokens.weight": "V D",
        "model.decoder.embed_positions.weight": "X D",
        "model.decoder.final_layer_norm.weight": "D",
    },
    layer={
        "self_attn.q_proj.weight": "Q D",
        "self_attn.k_proj.weight": "K D",
        "self_attn.v_proj.weight": "U D",
        "self_attn.out_proj.weight": "D O",
        "self_attn_layer_norm.weight": "D",
        "final_layer_norm.weight": "D",
        "fc1.weight": "I D",
        "fc2.weight": "D I",
    },
    dense={},
    biases=_if_set(
        "enable_bias",
        True,
        (*_QKV, "self_attn.out_proj", "self_attn_layer_norm", "final_layer_norm", "fc1", "fc2"),
    ),
    tied=True,
    optional_prefix="model.",
    position_offset=2,
)
_GEMMA2_NORMS = {"pre_feedforward_layernorm.weight": "D", "post_feedforward_layernorm.weight": "D"}
_DEEPSEEK_ATTENTION = {
    "self_attn.q_a_proj.weight": "A D",
    "self_attn.q_a_layernorm.weight": "A",
    "self_attn.q_b_proj.weight": "B A",
    "self_attn.kv_a_proj_with_mqa.weight": "R D",
    "self_attn.kv_a_layernorm.weight": "C",
    "self_attn.kv_b_proj.weight": "P C",
    "self_attn.o_proj.weight": "D O",
}
_GPT_OSS_EXPERTS = {
    "mlp.router.weight": "N D",
    "mlp.router.bias": "N",
    "mlp.experts.gate_up_proj": "N D W",
    "mlp.experts.gate_up_proj_bias": "N W",
    "mlp.experts.down_proj": "N E D",
    "mlp.experts.down_proj_bias": "N D",
}

_QWEN3 = Family(
    layer={**_LLAMA_ATTENTION, **_NORMS, **_QK_NORM},
    sparse=(_EACH_EXPERT, _FUSED_EXPERTS),
    biases=_if_set("attention_bias", False, _QKVO),
)
_GEMMA = Family(tied=True, biases=_if_set("attention_bias", False, _QKVO))

FAMILIES: dict[str, Family] = {
    "llama": Family(biases=_llama_biases),
    "mistral": Family(),
    "qwen2": Family(biases=lambda config: _QKV),
    "qwen2_vl": Family(biases=lambda config: _QKV),
    "qwen2_vl_text": Family(biases=lambda config: _QKV),
    "qwen2_5_vl": Family(biases=lambda config: _QKV),
    "qwen2_5_vl_text": Family(biases=lambda config: _QKV),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen2_moe": Family(
        sparse=tuple(
            {**rows, **_gated("mlp.shared_expert", "S"), "mlp.shared_expert_gate.weight": "1 D"}
            for rows in (_EACH_EXPERT, _FUSED_EXPERTS)
        ),
        biases=_if_set("qkv_bias", True, _QKV),
    ),
    "mixtral": Family(sparse=(_MIXTRAL_EXPERTS, _EACH_EXPERT, _FUSED_EXPERTS)),
    "phi3": Family(
        layer={
            **_NORMS,
            "self_attn.qkv_proj.weight": "Q+K+U D",
            "self_attn.o_proj.weight": "D O",
        },
        dense={"mlp.gate_up_proj.weight": "I+I D", "mlp.down_proj.weight": "D I"},
    ),
    "gemma": _GEMMA,
    "gemma2": Family(
        tied=True,
        layer={**_LLAMA_ATTENTION, **_NORMS, **_GEMMA2_NORMS},
        biases=_if_set("attention_bias", False, _QKVO),
    ),
    "gemma3_text": Family(
        tied=True,
        layer={**_LLAMA_ATTENTION, **_NORMS, **_GEMMA2_NORMS, **_QK_NORM},
        biases=_if_set("attention_bias", False, _QKVO),
    ),
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_oss": Family(
        layer={**_LLAMA_ATTENTION, **_NORMS, "self_attn.sinks": "H"},
        sparse=(_GPT_OSS_EXPERTS,),
        biases=_if_set("attention_bias", True, _QKVO),
    ),
    "deepseek_v3": Family(
        layer={**_DEEPSEEK_ATTENTION, **_NORMS},
        sparse=(
            {
                **_EACH_EXPERT,
                **_gated("mlp.shared_experts", "S"),
                "mlp.gate.e_score_correction_bias": "N",
            },
        ),
    ),
}
"""model_type → what its checkpoints hold."""


def vocabulary(facts: Facts, config: Config, family: Family) -> dict[str, Block]:
    """Return what each symbol stands for; those that the config does not say are left out."""
    heads, kv = facts.num_attention_heads, facts.num_key_value_heads
    keys, values = facts.head_dim, facts.v_head_dim
    positions = _count(config, "n_positions") or _count(config, "max_position_embeddings")
    latent, rope, straight = (
        _count(config, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
    )
    sizes: dict[str, tuple[str, int | None, int | None]] = {
        "D": ("", facts.hidden_size, 1),
        "V": ("vocab", facts.vocab_size, 1),
        "Q": ("query", heads, keys),
        "K": ("kv", kv, keys),
        "U": ("kv", kv, values),
        "O": ("query", heads, values),
        "H": ("query", heads, 1),
        "h": ("", keys, 1),
        "I": ("intermediate", facts.intermediate_size, 1),
        "E": ("moe_intermediate", facts.expert_width, 1),
        "W": ("moe_intermediate", facts.expert_width, 2),
        "S": ("shared_expert_intermediate", facts.shared_expert_intermediate_size, 1),
        "N": ("", facts.num_experts, 1),
        "X": ("", positions + family.position_offset if positions else None, 1),
        "1": ("", 1, 1),
        "A": ("", _count(config, "q_lora_rank"), 1),
        "B": ("query", heads, keys),
        "C": ("", latent, 1),
        "R": ("", latent + rope, 1),
        "P": ("query", heads, straight + values if values else None),
        **_of_a_tower(facts, config),
    }
    return {
        symbol: Block(split, units, width)
        for symbol, (split, units, width) in sizes.items()
        if units and width
    }


def _of_a_tower(facts: Facts, config: Config) -> dict[str, tuple[str, int | None, int | None]]:
    """Return the sizes that only towers have; those without a field are Hugging Face's defaults."""
    patch = _count(config, "patch_size")
    patches = (_count(config, "image_size") // patch) ** 2 if patch else 0
    merged = (_count(config, "spatial_merge_size") or 2) ** 2 * (facts.hidden_size or 0)
    joined = _count(config, "out_hidden_size") or _count(config, "hidden_size")
    sizes = {
        "c": _count(config, "num_channels") or _count(config, "in_channels") or 3,
        "p": patch,
        "t": _count(config, "temporal_patch_size") or 2,
        "x": patches,
        "y": patches + 1,
        "m": _count(config, "num_mel_bins"),
        "s": _count(config, "max_source_positions"),
        "3": 3,
        "G": merged,
        "g": joined,
    }
    return {symbol: ("", size, 1) for symbol, size in sizes.items()}


def _count(config: Config, name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
