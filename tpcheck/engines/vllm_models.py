"""What vLLM 0.33 does by a model's name: classes it has dropped, towers and experts of its own.

Requirement: a degree is never "ok" for a class that no longer loads, and a check that one model's
file has is not asked of another's. Read from the registry and the model files of the wheel.
"""

from __future__ import annotations

from tpcheck.engines.base import Finding, Rule, divisible, enough_experts
from tpcheck.engines.facts import Facts

_REGISTRY = "vllm/model_executor/models/registry.py:841-895,1225-1252"

_DROPPED = {
    "0.9.2": "Phi3SmallForCausalLM",
    "0.10.2": "MotifForCausalLM Phi4FlashForCausalLM DonutForConditionalGeneration",
    "0.22.0": "JAISLMHeadModel",
    "0.23.0": "InternLM2VEForCausalLM QWenLMHeadModel QwenVLForConditionalGeneration"
    " InternLMForCausalLM XverseForCausalLM MiniMaxText01ForCausalLM MiniMaxM1ForCausalLM"
    " MiniMaxVL01ForConditionalGeneration BaiChuanForCausalLM BaichuanForCausalLM"
    " Tarsier2ForConditionalGeneration",
    "0.24.0": "AquilaModel AquilaForCausalLM Grok1ModelForCausalLM Grok1ForCausalLM"
    " TarsierForConditionalGeneration MantisForConditionalGeneration",
    "0.25.0": "TeleChatForCausalLM",
    "0.26.0": "Plamo2ForCausalLM OuroForCausalLM",
    "0.28.0": "ArcticForCausalLM Cheers CheersForConditionalGeneration Fairseq2LlamaForCausalLM"
    " FireRedLIDForConditionalGeneration GritLM HCXVisionForCausalLM MPTForCausalLM"
    " MptForCausalLM RWForCausalLM StableLMEpochForCausalLM",
}
"""Last version → classes that only it and those before it have.

Left out are those that transformers still has in a form that vLLM's Transformers backend takes:
Bamba, Dots1, MiniMax, Persimmon, Chameleon, Fuyu, AyaVision, Phi4Multimodal.
"""
_LAST = {name: version for version, names in _DROPPED.items() for name in names.split()}

_NEVER = frozenset(
    "CodeGenForCausalLM GPTNeoForCausalLM GPTNeoXJapaneseForCausalLM XGLMForCausalLM"
    " OpenAIGPTLMHeadModel XLNetLMHeadModel RwkvForCausalLM CpmAntForCausalLM"
    " MegatronBertForCausalLM RemBertForCausalLM RoFormerForCausalLM BigBirdForCausalLM"
    " ProphetNetForCausalLM ReformerModelWithLMHead TrOCRForCausalLM MvpForCausalLM".split()
)
"""Classes of transformers with no file in vLLM and no backend-compatible attention."""


def _architecture(facts: Facts, tp_size: int) -> Finding | None:
    name = facts.architecture
    if name in _LAST:
        text = (
            f"Model architecture {name} was supported in vLLM until v{_LAST[name]}, and is not"
            " supported anymore. Please use an older version of vLLM if you want to use this model"
            " architecture."
        )
        return Finding("error", text, text, fix=f"vLLM {_LAST[name]} or older")
    if name not in _NEVER:
        return None
    text = f"Model architectures ['{name}'] are not supported for now."
    return Finding("error", text, text, fix="use an engine that has this class")


WHOLE_TOWERS = frozenset(
    "qwen2_audio_encoder gemma3n_vision gemma3n_audio gemma4_vision gemma4_audio".split()
)
"""Towers that are transformers' own modules, which nothing splits."""

_WHOLE_ATTENTION = frozenset(
    "intern_vit_6b intern_vit internvl_vision qwen3_omni_moe_audio_encoder".split()
)
"""Towers whose attention stays whole on every rank where its heads do not divide."""


def _whole_attention(facts: Facts, tp_size: int) -> Finding | None:
    heads = facts.num_attention_heads
    assert heads is not None
    if heads % tp_size == 0:
        return None
    reason = f"num_attention_heads={heads}: attention is whole on each rank"
    return Finding("replicate", reason, None, {"whole_attention": True})


def checks_heads(facts: Facts) -> bool:
    """Whether attention is split, so that its heads must divide."""
    return facts.model_type not in _WHOLE_ATTENTION


_COUNTS_EXPERTS = frozenset(
    "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text qwen3_vl_moe_text qwen3_omni_moe_text"
    " ernie4_5_moe ernie4_5_vl_moe_text minimax_m2 minimax_m3_vl_text lfm2_moe laguna hy_v3 hy_v4"
    " exaone_moe cohere2_moe mimo_v2_flash step3_text step3p5 k2_horizon".split()
)
"""Model types whose file refuses more ranks than experts; no other file does."""


_NO_ASSERT = frozenset("gpt_oss starcoder2 olmo2 olmo3 hunyuan_v1_moe".split())
"""Model types with no assert about KV heads before QKVParallelLinear divides them."""


def has_assert(facts: Facts) -> bool:
    """Whether a bare assert of the model's file is the first to see KV heads."""
    return checks_heads(facts) and facts.model_type not in _NO_ASSERT


def _kv_divide(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    assert kv_heads is not None
    larger, smaller = max(kv_heads, tp_size), min(kv_heads, tp_size)
    if larger % smaller == 0:
        return None
    text = f"{larger} is not divisible by {smaller}"
    return Finding("error", f"num_key_value_heads={kv_heads}: {text}", text)


def _divides_kv(facts: Facts) -> bool:
    return facts.model_type in _NO_ASSERT


ARCHITECTURE = Rule("vllm.architecture", _REGISTRY, _architecture, area="model", role="text")
TOWERS = (
    divisible(
        "vllm.divide",
        "num_attention_heads",
        "vllm/distributed/utils.py:57-61",
        text="{value} is not divisible by {tp}",
        role="tower",
        when=checks_heads,
    ),
    Rule(
        "vllm.tower_attention",
        "vllm/model_executor/models/intern_vit.py:141-165; qwen3_omni_moe_thinker.py:211",
        _whole_attention,
        ("num_attention_heads",),
        role="tower",
        when=lambda facts: not checks_heads(facts),
        refuses=False,
    ),
)
KV_DIVIDE = Rule(
    "vllm.kv_divide",
    "vllm/model_executor/layers/linear.py:1065-1071",
    _kv_divide,
    ("num_key_value_heads",),
    "qkv_proj",
    when=_divides_kv,
)
EXPERTS = enough_experts(
    "vllm.moe_experts",
    "vllm/model_executor/models/qwen3_moe.py:154-159; qwen2_moe.py:136; minimax_m2.py:80",
    _COUNTS_EXPERTS,
)
