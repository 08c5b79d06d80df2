"""Read a config, whole or a fragment, as the facts of its parts.

Requirement: every spelling that models use (GPT-2's n_head, Falcon's num_kv_heads, Megatron's
num_query_groups) comes out as one fact; a fact that is not a number is a PlanError that names it;
what is not there stays unknown and is never guessed, except where Hugging Face's own default for
that model type says it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tpcheck.engines.facts import Facts
from tpcheck.engines.fields import choice, count, number, word
from tpcheck.engines.linears import part_linears
from tpcheck.engines.quant_reading import read_quant
from tpcheck.engines.state_space_reading import derive_state_space
from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

Config = Mapping[str, Any]

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "embed_dim", "n_embd", "d_model", "hidden", "h"),
    "intermediate_size": (
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "ffn_dim",
        "encoder_ffn_dim",
        "mlp_hidden_size",
        "i",
    ),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "attention_heads",
        "H",
    ),
    "num_key_value_heads": (
        "num_key_value_heads",
        "num_query_groups",
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
        "KV",
    ),
    "head_dim": ("head_dim", "kv_channels", "hd"),
    "v_head_dim": ("v_head_dim", "v_head_size", "hd_v"),
    "vocab_size": ("vocab_size", "padded_vocab_size", "v"),
    "moe_intermediate_size": ("moe_intermediate_size", "moe_ffn_hidden_size", "expert_dim"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "shared_expert_intermediate_size": (
        *("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"),
    ),
    "num_hidden_layers": (
        *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth"),
    ),
    "linear_num_key_heads": ("linear_num_key_heads",),
    "linear_num_value_heads": ("linear_num_value_heads",),
    "linear_key_head_dim": ("linear_key_head_dim",),
    "linear_value_head_dim": ("linear_value_head_dim",),
    "mamba_num_heads": ("mamba_num_heads", "mamba_n_heads", "n_mamba_heads"),
    "mamba_n_groups": ("mamba_n_groups", "mamba_ngroups"),
    "mamba_intermediate_size": ("mamba_d_ssm",),
    "sharded_dim": ("sharded_dim", "n"),
    "ep_size": ("ep_size",),
    "moe_dp_size": ("moe_dp_size",),
    "pad_alignment_size_per_rank": ("pad_alignment_size_per_rank",),
    "tp_grain_size": ("tp_grain_size",),
    "make_vocab_size_divisible_by": ("make_vocab_size_divisible_by",),
    "decode_context_parallel_size": ("decode_context_parallel_size",),
    "kv_size_multiplier": ("kv_size_multiplier",),
    "batch": ("batch",),
    "seq_len": ("seq_len",),
}
"""Fact → the fields it may stand in, the first one given wins."""

_DEFAULTS: dict[str, dict[str, int]] = {
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4},
    "gemma3_text": {"head_dim": 256, "num_key_value_heads": 4, "num_attention_heads": 8},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8},
    "starcoder2": {"num_key_value_heads": 2},
}
"""What Hugging Face's config class of a model type assumes when a field is absent."""

_RUN_DEFAULTS = {
    "ep_size": 1,
    "moe_dp_size": 1,
    "pad_alignment_size_per_rank": 1,
    "tp_grain_size": 64,
    "make_vocab_size_divisible_by": 128,
    "decode_context_parallel_size": 1,
}
"""What engines assume of a run."""

_PLAIN_MLP = frozenset(
    "gpt2 opt falcon bloom gpt_neox gptj gpt_neo gpt_bigcode starcoder2 phi mpt codegen nemotron"
    " stablelm_epoch persimmon arcee apertus nemotron_h".split()
)
_GATED_TOWERS = frozenset("qwen2_5_vl qwen2_5_vl_vision pixtral".split())
_FOUR_TIMES_HIDDEN = frozenset("gpt2 falcon bloom gptj gpt_neo gpt_bigcode mpt codegen".split())

_TENSORS = {
    "qkv_proj": "qkv_proj q_proj k_proj v_proj query_key_value qkv c_attn wqkv W_pack",
    "o_proj": "o_proj out_proj dense wo",
    "gate_up_proj": "gate_up_proj gate_proj up_proj w1 w3 c_fc fc1 fc_in dense_h_to_4h",
    "down_proj": "down_proj w2 c_proj fc2 fc_out dense_4h_to_h scales scale_inv qzeros",
    "lm_head": "lm_head embed_tokens embed_out vocab",
    "experts": "experts",
}
_SCOPES = {name: scope for scope, names in _TENSORS.items() for name in names.split()}
_STAGES = ("create", "load", "run")


def read_facts(config: Config, *, role: str = "text", where: str = "config") -> Facts:
    """Return the facts of one part.

    Raises:
        PlanError: a field is malformed; names it and its value.
    """
    config = _flattened(config, where)
    model_type = word(config, "model_type", where)
    numbers = {fact: number(config, names, where) for fact, names in _SPELLINGS.items()}
    if role == "tower" and "embed_dim" in config:
        # Qwen2-VL's tower calls the decoder's width hidden_size
        numbers["hidden_size"] = number(config, ("embed_dim",), where)
    _contradict(config, where)
    for fact, default in _DEFAULTS.get(model_type or "", {}).items():
        if numbers[fact] is None:
            numbers[fact] = default
    _derive(numbers, config, model_type, where)
    uses_mla = config.get("kv_lora_rank") is not None
    gated = model_type not in _PLAIN_MLP if role == "text" else model_type in _GATED_TOWERS
    quant = read_quant(config, where)
    tensor = _scope(config, where)
    linears = part_linears(numbers, config, uses_mla=uses_mla, gated=gated)
    known: dict[str, Any] = {
        fact: value if value is not None else _RUN_DEFAULTS.get(fact)
        for fact, value in numbers.items()
    }
    return Facts(
        **known,
        role=role,
        model_type=model_type,
        architecture=_architecture(config, where),
        uses_mla=uses_mla,
        gated=gated,
        tied=config.get("tie_word_embeddings") is True,
        dtype=_dtype(config),
        quant=quant,
        linears=tuple(one for one in linears if tensor in (None, one.name.rpartition(".")[2])),
        tensor=tensor,
        stage=choice(config, "stage", _STAGES, "run", where),
        device=choice(config, "device", ("cuda", "cpu"), "cuda", where),
        compute_capability=_capability(config, where),
        memory=_memory(config, where),
        moe_backend=_lower(word(config, "moe_backend", where)),
        linear_backend=_lower(word(config, "linear_backend", where)),
        sequence_parallel=config.get("sequence_parallel") is True,
        inference_layers=config.get("inference_layers") is True,
        inference_v2="v2" in str(config.get("mode") or ""),
        use_local_output=config.get("local", config.get("use_local_output")) is not False,
    )


_SAME = (
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
)
"""Pairs of names that say the same thing."""


def _contradict(config: Config, where: str) -> None:
    """Raise where two fields cannot both be true: no engine's answer would mean anything.

    Raises:
        PlanError: names both fields and their values.
    """
    for name, other in _SAME:
        values = [number(config, (one,), where) for one in (name, other)]
        if None not in values and values[0] != values[1]:
            raise PlanError(
                f"{where}: {name}={values[0]}, but {other}={values[1]}: they say the same thing"
            )
    heads, kv_heads = (config.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        raise PlanError(
            f"{where}: num_attention_heads={heads}, but should be a multiple of"
            f" num_key_value_heads={kv_heads}"
        )
    chosen, experts = (
        number(config, (name,), where) for name in ("num_experts_per_tok", "num_experts")
    )
    if chosen and experts and chosen > experts:
        raise PlanError(
            f"{where}: num_experts_per_tok={chosen}, but should be at most num_experts={experts}"
        )


_NESTED = {
    "attn_config": {"kv_n_heads": "num_key_value_heads"},
    "ffn_config": {"ffn_hidden_size": "intermediate_size", "moe_num_experts": "num_local_experts"},
}
"""Objects in which DBRX and MPT keep some fields → those fields, as the others spell them."""


def _flattened(config: Config, where: str) -> Config:
    """Return a config with the fields of such objects beside the others, which win."""
    found: dict[str, Any] = {}
    for name, spellings in _NESTED.items():
        fields = config.get(name)
        if fields is None:
            continue
        if not isinstance(fields, Mapping):
            raise PlanError(f"{where}: {name}={brief(fields)}, but should be an object of fields")
        found |= {new: fields[old] for old, new in spellings.items() if fields.get(old) is not None}
    return {**found, **config} if found else config


def _derive(
    numbers: dict[str, int | None], config: Config, model_type: str | None, where: str
) -> None:
    """Fill in what follows from other fields."""
    hidden, heads = numbers["hidden_size"], numbers["num_attention_heads"]
    if config.get("kv_lora_rank") is not None and numbers["v_head_dim"]:
        turned, straight = (
            count(config, f"qk_{kind}_head_dim", where) for kind in ("rope", "nope")
        )
        numbers["head_dim"] = turned + straight or numbers["head_dim"]
    shared = config.get("multi_query") is True and not config.get("new_decoder_architecture")
    if model_type == "falcon" and shared:
        # the class writes num_kv_heads=71 beside it, and holds one
        numbers["num_key_value_heads"] = 1
    if numbers["num_key_value_heads"] is None and heads is not None:
        numbers["num_key_value_heads"] = 1 if shared else heads
    if not numbers["head_dim"] and hidden and heads and hidden % heads == 0:
        numbers["head_dim"] = hidden // heads
    if numbers["v_head_dim"] is None:
        numbers["v_head_dim"] = numbers["head_dim"]
    if numbers["intermediate_size"] is None and hidden:
        ratio = config.get("mlp_ratio") or config.get("expansion_ratio")
        if isinstance(ratio, (int, float)) and 0 < ratio < 1000:
            numbers["intermediate_size"] = max(1, int(hidden * ratio))
        elif model_type in _FOUR_TIMES_HIDDEN:
            numbers["intermediate_size"] = 4 * hidden
    elif model_type == "qwen" and numbers["intermediate_size"]:
        # the first Qwen counts gate and up together
        numbers["intermediate_size"] //= 2
    derive_state_space(numbers, config, model_type, where)
    _derive_experts(numbers, config, where)


_SHARED_EXPERTS = (
    *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
)


def _derive_experts(numbers: dict[str, int | None], config: Config, where: str) -> None:
    width, experts = numbers["moe_intermediate_size"], numbers["num_experts"]
    if experts and width is None and "num_local_experts" in config:
        numbers["moe_intermediate_size"] = width = numbers["intermediate_size"]
    shared = number(config, _SHARED_EXPERTS, where)
    # Hunyuan's shared experts are as wide as a dense layer, the others' as an expert
    hunyuan = config.get("model_type") == "hunyuan_v1_moe"
    each = numbers["intermediate_size"] if hunyuan else width
    if experts and shared and each and numbers["shared_expert_intermediate_size"] is None:
        numbers["shared_expert_intermediate_size"] = shared * each
    all_sparse = not (
        count(config, "first_k_dense_replace", where)
        or count(config, "moe_layer_start_index", where)
        or config.get("mlp_only_layers")
        or count(config, "decoder_sparse_step", where) > 1
    )
    if experts and width and all_sparse:
        numbers["intermediate_size"] = None
    dense = number(config, ("intermediate_size_mlp",), where)
    if dense and experts:
        # Llama 4's intermediate_size is an expert's, and that of the expert beside them
        numbers["shared_expert_intermediate_size"] = width
        interleaved = count(config, "interleave_moe_layer_step", where) > 1
        numbers["intermediate_size"] = dense if interleaved else None


def _lower(text: str | None) -> str | None:
    return text.lower() if text else None


def _architecture(config: Config, where: str) -> str | None:
    names = config.get("architectures")
    if not names:
        return None
    if not isinstance(names, (list, tuple)) or not isinstance(names[0], str):
        raise PlanError(
            f"{where}: architectures={brief(names)}, but should be a list of class names"
        )
    return names[0]


def _dtype(config: Config) -> str | None:
    value = config.get("torch_dtype") or config.get("dtype")
    return str(value).removeprefix("torch.") if value else None


def _capability(config: Config, where: str) -> str:
    value = str(config.get("compute_capability") or "8.0")
    if not re.fullmatch(r"\d+(\.\d)?", value):
        raise PlanError(f"{where}: compute_capability={brief(value)}, but should look like 8.0")
    return value


def _scope(config: Config, where: str) -> str | None:
    name = word(config, "tensor", where)
    if name is None:
        return None
    last = name.partition(" ")[0].rpartition(".")[2]
    if last not in _SCOPES:
        known = ", ".join(_TENSORS)
        raise PlanError(f"{where}: tensor={brief(name)}, but should be one of {known}")
    return _SCOPES[last]


def _memory(config: Config, where: str) -> tuple[float, ...] | None:
    """Read the memory of each device; "equal" or nothing is the same on all."""
    for name in ("gpu_mem_gb", "gpu_split"):
        value = config.get(name)
        if value is None or value in ("equal", "auto"):
            continue
        sizes = value if isinstance(value, (list, tuple)) else ()
        if not sizes or not all(isinstance(size, (int, float)) and size > 0 for size in sizes):
            raise PlanError(f"{where}: {name}={brief(value)}, but should be a list of sizes in GB")
        return tuple(float(size) for size in sizes)
    return None
