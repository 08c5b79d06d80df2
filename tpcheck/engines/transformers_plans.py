"""Which model types have a plan in transformers 5.23, and what it does to attention.

Requirement: read, not remembered: from the `base_model_tp_plan` of every config class of 5.23.0,
whether it cuts heads, gathers them or leaves attention whole.
"""

from __future__ import annotations

from tpcheck.engines.base import is_gpt_oss
from tpcheck.engines.facts import Facts

_HEADS = frozenset(
    "apertus arcee aria_text axk2 beam cohere cohere2 cohere2_moe cohere_compass_text cwm"
    " cosmos3_edge_text deepseek_ocr2_encoder deepseek_ocr2_text deepseek_v2 deepseek_v32"
    " diffusion_gemma_text doge dots1 dots3_note_text embedding_gemma2_text ernie4_5 ernie4_5_moe"
    " ernie4_5_vl_moe_text esmc eurobert exaone4 exaone_moe gemma gemma2 gemma3_text gemma3n_text"
    " gemma4_text gemma4_unified_text gemma4_vision glm glm4 glm4_moe glm4_moe_lite glm4v_moe_text"
    " glm4v_text glm5_next_text glm_image_text glm_moe_dsa glm_ocr_text gpt_neox granite"
    " granite4_vision_text granite_docling_text granite_swa granitemoe_swa helium higgs_audio_v2"
    " hrm_text hy_v3 hy_v4 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama"
    " llama4_text llama4_vision_model longcat_flash mellum mimo_v2_flash minicpm3 minimax ministral"
    " ministral3 mistral mixtral muse_glimmer_assistant muse_glimmer_text muse_glimmer_vision"
    " nanochat nemotron neomme olmo paddleocr_vl_text phi qwen2 qwen2_5_omni_text qwen2_5_vl_text"
    " qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next"
    " qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_text"
    " qwen3_vl_moe_text seed_oss smollm3 solar_open starcoder2 t5_gemma_module t5gemma2_decoder"
    " t5gemma2_text ultrabert unlimited_ocr_text vaultgemma voxtral_realtime_text".split()
)
_GATHERED = frozenset(
    "flex_olmo minimax_m2 minimax_m3_vl_text olmo2 olmo3 olmo_hybrid olmoe phi3 phi4_multimodal"
    " qwen4_exp_text step3p5".split()
)
_WHOLE = frozenset(
    "afmoe axk1 bailing_hybrid deepseek_v3 deepseek_v4 dots3_note_vision_encoder"
    " ernie4_5_vl_moe_vision flint granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe"
    " inkling2_text inkling_text jamba kimi_linear lfm2_moe mistral4 mistral_large4_text"
    " muse_glimmer muse_spark muse_spark_text nemotron_h phimoe youtu".split()
)
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "gptj": "GPTJForCausalLM",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
    "codegen": "CodeGenForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "ctrl": "CTRLLMHeadModel",
    "xglm": "XGLMForCausalLM",
    "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
}
"""Class names that are not the model type in capitals with ForCausalLM behind."""
_OTHERS = frozenset("gpt_oss falcon bloom mpt yuan qwen chatglm internlm2 dbrx".split())
"""More model types that have no plan of their own."""


def is_known(model_type: str) -> bool:
    """Whether the rules say anything about a model type by name."""
    return (
        model_type in _HEADS | _GATHERED | _WHOLE | _CLASSES.keys() | _OTHERS
        or f"{model_type}_text" in _HEADS
    )


def plan_of(facts: Facts) -> str | None:
    """Return how the plan treats attention; None where the model type has no plan.

    Without a model type a plan like llama's is assumed.
    """
    kind = facts.model_type
    if kind is None or kind in _HEADS or f"{kind}_text" in _HEADS:
        return "heads"
    if kind in _GATHERED:
        return "gathered"
    if kind in _WHOLE:
        return "whole"
    return "lm_head" if is_gpt_oss(facts) else None


def class_name(model_type: str) -> str:
    """Return the class that transformers loads for a model type."""
    camel = "".join(word[:1].upper() + word[1:] for word in model_type.split("_"))
    return _CLASSES.get(model_type, f"{camel}ForCausalLM")
