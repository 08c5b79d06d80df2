"""What SGLang 0.5.23 does by the name of a model: towers and experts that have code of their own.

Requirement: a check that one model's file has is not asked of another's. Read from the model files
of the wheel.
"""

from __future__ import annotations

from tpcheck.engines.base import Finding, Rule, divisible, enough_experts
from tpcheck.engines.facts import Facts, round_up

WHOLE_TOWERS = frozenset("qwen2_audio_encoder gemma3n_vision gemma3n_audio".split())
"""Towers that are transformers' own modules, which nothing splits."""

_PADDED_TOWERS = frozenset(
    "intern_vit_6b intern_vit internvl_vision glm4v glm4v_vision glm4v_moe glm4v_moe_vision"
    " glm_ocr_vision".split()
)
"""Towers that get dummy heads up to the next multiple of the degree."""


def _pads_heads(facts: Facts) -> bool:
    return facts.device == "cuda" and facts.model_type in _PADDED_TOWERS


def checks_heads(facts: Facts) -> bool:
    """Whether heads must divide: on CPU they are padded, and so are those of some towers."""
    return facts.device == "cuda" and facts.model_type not in _PADDED_TOWERS


def _dummy_heads(facts: Facts, tp_size: int) -> Finding | None:
    heads = facts.num_attention_heads
    assert heads is not None
    padded = round_up(heads, tp_size)
    if padded == heads:
        return None
    held = {"heads": {"pad_unit": tp_size, "padded_heads": padded}}
    return Finding("pad", f"num_attention_heads={heads} padded to {padded}", None, held)


_COUNTS_EXPERTS = frozenset(
    "qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text qwen3_vl_moe_text qwen3_omni_moe_text deepseek"
    " deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 glm4_moe glm_moe_dsa glm4v_moe_text"
    " glm4_moe_lite hunyuan_v1_moe lfm2_moe longcat_flash mimo_v2_flash minimax_m2"
    " minimax_m3_vl_text afmoe cohere2_moe exaone_moe ernie4_5_vl_moe_text step3_text step3p5"
    " k2_horizon zaya".split()
)
"""Model types whose file refuses more ranks than experts; no other file does."""


TOWERS = (
    divisible(
        "sglang.vision_heads",
        "num_attention_heads",
        "sglang/srt/layers/attention/vision.py",
        text="{value} is not divisible by {tp}",
        role="tower",
        when=checks_heads,
    ),
    Rule(
        "sglang.vision_dummy_heads",
        "sglang/srt/layers/attention/vision_utils.py:8-23; models/internvl.py:522",
        _dummy_heads,
        ("num_attention_heads",),
        role="tower",
        when=_pads_heads,
        refuses=False,
    ),
)
EXPERTS = enough_experts(
    "sglang.moe_experts",
    "sglang/srt/models/qwen3_moe.py:248; deepseek_v2.py:716; glm4_moe.py:424",
    _COUNTS_EXPERTS,
)
