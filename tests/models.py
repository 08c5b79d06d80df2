"""Small real Hugging Face model directories, made by transformers from a seed.

Every test that needs a model on disk takes one from here, so that a session makes each only once.
Biases and norm weights are drawn too: zeros and ones would hide a bias added twice and a norm
weight that is never applied.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 2.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": 101,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 64,
}
GPT_OSS_CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 3,
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "truncate": False,
    },
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama_biases": {"model_type": "llama", **SMALL, "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"model_type": "llama", **SMALL, "rope_parameters": LLAMA3_ROPE},
    "llama_linear_rope": {
        "model_type": "llama",
        **SMALL,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama_yarn": {"model_type": "llama", **SMALL, "rope_parameters": YARN_ROPE},
    "llama_yarn_mscale": {
        "model_type": "llama",
        **SMALL,
        "rope_parameters": {
            **YARN_ROPE,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 4096,  # the ramp ends behind the last pair
            "truncate": False,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    },
    "llama_tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": None},
    "mistral_window": {"model_type": "mistral", **SMALL, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen2_tied": {"model_type": "qwen2", **SMALL, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 16},
    "qwen3_biases": {"model_type": "qwen3", **SMALL, "head_dim": 16, "attention_bias": True},
    "gpt2": {"model_type": "gpt2", **GPT2},
}
"""Config fields by name. Heads 6, KV heads 2: degrees 1, 2, 3 (not for KV) and 6 (replicated)."""


def make_model(
    directory: Path, name: str, *, seed: int = 0, max_shard_size: str = "5GB", **fields: Any
) -> Path:
    """Save the model `name` of MODELS, with `fields` replaced, and return its directory.

    A directory that already holds a model is left as it is.
    """
    if (directory / "config.json").exists():
        return directory
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**MODELS[name], **fields})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                std = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.normal_(std=std)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def load_model(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Return transformers' own model of a directory, with eager attention, in eval mode."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", local_files_only=True
        )
    return model.eval()
