"""Read a Hugging Face config.json as a ModelSpec. Torch-free.

Requirement: the spec says the same function as transformers computes from this config, or a
PlanError names the field and value that the reference decoder cannot do. A field is never ignored
when it changes the function. Both spellings of rope are read: `rope_theta` with `rope_scaling`, and
transformers 5's `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpcheck.errors import PlanError, SubjectError, TPCheckError
from tpcheck.files import read_json
from tpcheck.hf.fields import Config
from tpcheck.hf.fields import get as _get
from tpcheck.hf.fields import refuse_unless as _refuse_unless
from tpcheck.hf.fields import required as _required
from tpcheck.hf.quantization import read_quantization
from tpcheck.hf.rope import rope_fields
from tpcheck.json_reader import brief
from tpcheck.spec import ModelSpec


def read_config(directory: Path) -> dict[str, Any]:
    """Return the fields of `directory`/config.json.

    Raises:
        SubjectError: there is no such directory or file; names the path and what is there.
        PlanError: the file is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise SubjectError(
            f"{directory}: config.json is not there; {describe_directory(directory)}"
        )
    try:
        config = read_json(path)
    except TPCheckError as error:
        raise PlanError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise PlanError(f"{path}: a {type(config).__name__}, but should be an object of fields")
    return config


def describe_directory(directory: Path) -> str:
    """Say what a directory holds instead of what was looked for."""
    if not directory.is_dir():
        return "the directory does not exist" if not directory.exists() else "it is a file"
    names = sorted(path.name for path in directory.iterdir())
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"it holds {shown}" if names else "it is empty"


def spec_from_config(config: Config) -> ModelSpec:
    """Return the spec that a config.json describes.

    Args:
        config: the fields of a llama, mistral, qwen2, qwen3, gpt2, mixtral, qwen2_moe, qwen3_moe
            or gpt_oss config.

    Raises:
        PlanError: a field is missing, malformed, or something the reference decoder cannot do.
    """
    model_type = config.get("model_type")
    reader = _READERS.get(model_type) if isinstance(model_type, str) else None
    if reader is None:
        raise PlanError(
            f"config: model_type={brief(model_type)}, but should be one of {', '.join(_READERS)}"
        )
    fields = {"model_type": model_type, "vocab_size": _required(config, "vocab_size")}
    fields |= reader(config) | {"quantization": read_quantization(config)}
    try:
        return ModelSpec.from_fields(fields)
    except PlanError as error:
        raise PlanError(f"config: {error}") from error


def _llama_like(config: Config) -> dict[str, Any]:
    return {
        "hidden_size": _required(config, "hidden_size"),
        "intermediate_size": _required(config, "intermediate_size"),
        "num_hidden_layers": _required(config, "num_hidden_layers"),
        "num_attention_heads": _required(config, "num_attention_heads"),
        "num_key_value_heads": _get(config, "num_key_value_heads", 0),
        "head_dim": _get(config, "head_dim", 0),
        "hidden_act": _get(config, "hidden_act", "silu"),
        "norm_eps": _get(config, "rms_norm_eps", 1e-6),
        "max_position_embeddings": _get(config, "max_position_embeddings", 2048),
        "tie_word_embeddings": _get(config, "tie_word_embeddings", False),
        **rope_fields(config),
    }


def _llama(config: Config) -> dict[str, Any]:
    bias = _get(config, "attention_bias", False)
    return {
        **_llama_like(config),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": _get(config, "mlp_bias", False),
    }


def _mistral(config: Config) -> dict[str, Any]:
    fields = _llama_like(config)
    if "num_key_value_heads" not in config:
        fields["num_key_value_heads"] = 8  # MistralConfig's default; null means "as many as heads"
    window = config.get("sliding_window", 4096)
    return {**fields, "sliding_window": _uniform_window(config, window or 0)}


def _qwen2(config: Config) -> dict[str, Any]:
    return {
        **_llama_like(config),
        "attention_bias": True,
        "sliding_window": _qwen_window(config),
    }


def _qwen3(config: Config) -> dict[str, Any]:
    bias = _get(config, "attention_bias", False)
    return {
        **_llama_like(config),
        "head_dim": _get(config, "head_dim", 128),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "qk_norm": "per_head",
        "sliding_window": _qwen_window(config),
    }


def _mixtral(config: Config) -> dict[str, Any]:
    defaults = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}
    return {
        **_llama_like({**defaults, **config}),
        "sliding_window": _uniform_window(config, _get(config, "sliding_window", 0)),
        "num_experts": _experts(config, 8),
        "num_experts_per_tok": _get(config, "num_experts_per_tok", 2),
        "norm_topk_prob": True,
    }


def _qwen2_moe(config: Config) -> dict[str, Any]:
    if config.get("layer_types") is None:
        _refuse_unless(config, "use_sliding_window", False)  # it has windows in every other layer
    window = _get(config, "sliding_window", 4096) if config.get("use_sliding_window") else 0
    return {
        **_llama_like({"num_key_value_heads": 16, **config}),
        **_qwen_experts(config, num_experts=60, chosen=4, size=1408),
        "attention_bias": _get(config, "qkv_bias", True),
        "sliding_window": _uniform_window(config, window),
        "shared_expert_intermediate_size": _get(config, "shared_expert_intermediate_size", 5632),
    }


def _qwen3_moe(config: Config) -> dict[str, Any]:
    bias = _get(config, "attention_bias", False)
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else 0
    return {
        **_llama_like({"num_key_value_heads": 4, **config}),
        **_qwen_experts(config, num_experts=128, chosen=8, size=768),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "qk_norm": "per_head",
        "sliding_window": _uniform_window(config, window or 0),
    }


def _qwen_experts(config: Config, *, num_experts: int, chosen: int, size: int) -> dict[str, Any]:
    """Read Qwen's experts; keyword arguments are the defaults. Every layer has to have them."""
    _refuse_unless(config, "mlp_only_layers", [])
    _refuse_unless(config, "decoder_sparse_step", 1)
    return {
        "num_experts": _experts(config, num_experts),
        "num_experts_per_tok": _get(config, "num_experts_per_tok", chosen),
        "moe_intermediate_size": _get(config, "moe_intermediate_size", size),
        "norm_topk_prob": _get(config, "norm_topk_prob", False),
    }


def _experts(config: Config, default: int) -> Any:
    """Read how many experts there are; transformers 5 renames Qwen3's as Mixtral spells it."""
    names = [name for name in ("num_local_experts", "num_experts") if config.get(name) is not None]
    values = [config[name] for name in names]
    if len(values) == 2 and values[0] != values[1]:
        raise PlanError(
            f"config: num_experts={brief(values[1])}, but should be"
            f" num_local_experts={brief(values[0])}"
        )
    if values and not values[0]:
        raise PlanError(f"config: {names[0]}={brief(values[0])}, but should be at least 1")
    return values[0] if values else default


def _gpt_oss(config: Config) -> dict[str, Any]:
    config = {**_GPT_OSS, **config}
    if all(config.get(name) is None for name in ("rope_parameters", "rope_scaling")):
        config["rope_scaling"] = _GPT_OSS_ROPE
    layers = _required(config, "num_hidden_layers")
    types = config.get("layer_types")
    if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:
        raise PlanError(
            f"config: num_hidden_layers={brief(layers)}, but should be from 1 to {_MOST_LAYERS}"
        )
    if types is None:
        types = [_GPT_OSS_LAYERS[layer % 2] for layer in range(layers)]
    elif isinstance(types, list) and len(types) != layers:
        raise PlanError(
            f"config: layer_types has {len(types)} entries, but should have"
            f" num_hidden_layers={layers}"
        )
    bias, limit = _get(config, "attention_bias", True), _get(config, "swiglu_limit", 7.0)
    if limit == 0:
        raise PlanError("config: swiglu_limit=0, but should be positive: it silences every expert")
    return {
        **_llama_like(config),
        "hidden_act": "silu",  # whatever hidden_act says: its experts know no other
        "attention_bias": bias,
        "attention_out_bias": bias,
        "attention_sinks": True,
        "layer_types": types,
        "sliding_window": config.get("sliding_window", 128) or 0,
        "num_experts": _experts(config, 128),
        "num_experts_per_tok": _chosen(config, 4),
        "mlp_bias": True,
        "router_bias": True,
        "router_scoring": "topk_softmax",
        "swiglu_limit": limit,
        "swiglu_alpha": _get(config, "swiglu_alpha", 1.702),
    }


_GPT_OSS = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}
_MOST_LAYERS = 100_000
_GPT_OSS_LAYERS = ("sliding_attention", "full_attention")
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _chosen(config: Config, default: int) -> Any:
    """Read how many experts a token chooses; OpenAI's own name for it is experts_per_token."""
    chosen = config.get("num_experts_per_tok")
    own = config.get("experts_per_token")
    if None not in (chosen, own) and chosen != own:
        raise PlanError(
            f"config: experts_per_token={brief(own)}, but should be"
            f" num_experts_per_tok={brief(chosen)}"
        )
    return next((value for value in (chosen, own) if value is not None), default)


def _gpt2(config: Config) -> dict[str, Any]:
    for name, neutral in _GPT2_NEUTRAL.items():
        _refuse_unless(config, name, neutral)
    hidden_size = _required(config, "n_embd")
    if not isinstance(hidden_size, int):
        raise PlanError(f"config: n_embd={brief(hidden_size)}, but should be a whole number")
    return {
        "hidden_size": hidden_size,
        "intermediate_size": config.get("n_inner") or 4 * hidden_size,
        "num_hidden_layers": _required(config, "n_layer"),
        "num_attention_heads": _required(config, "n_head"),
        "hidden_act": _get(config, "activation_function", "gelu_new"),
        "mlp": "plain",
        "norm_type": "layer",
        "norm_eps": _get(config, "layer_norm_epsilon", 1e-5),
        "position": "learned",
        "max_position_embeddings": _get(config, "n_positions", 1024),
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": _get(config, "tie_word_embeddings", True),
    }


_GPT2_NEUTRAL = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

_READERS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
}


def _qwen_window(config: Config) -> int:
    """Return Qwen's window: layers from `max_window_layers` on have it, when it is used at all."""
    if not _get(config, "use_sliding_window", False):
        return _uniform_window(config, 0)
    window = _get(config, "sliding_window", 4096)
    if config.get("layer_types") is not None:
        return _uniform_window(config, window)
    layers = _required(config, "num_hidden_layers")
    first = _get(config, "max_window_layers", 28)
    for name, value in (("num_hidden_layers", layers), ("max_window_layers", first)):
        if not isinstance(value, int):
            raise PlanError(f"config: {name}={brief(value)}, but should be a whole number")
    if first in range(1, layers):
        raise PlanError(
            f"config: max_window_layers={first}, but should be 0 or at least"
            f" num_hidden_layers={layers}: the reference decoder has one kind of layer"
        )
    return window if first == 0 else 0


def _uniform_window(config: Config, window: int) -> int:
    """Return the window of every layer; `layer_types`, where given, must not mix them."""
    types = config.get("layer_types")
    if types is None:
        return window
    plain = isinstance(types, list) and all(isinstance(one, str) for one in types)
    kinds = set(types) if plain else set()
    if kinds == {"full_attention"}:
        return 0
    if kinds == {"sliding_attention"} and window:
        return window
    raise PlanError(
        f"config: layer_types={brief(types)}, but should all be full_attention, or all be"
        " sliding_attention with a window: the reference decoder has one kind of layer"
    )
