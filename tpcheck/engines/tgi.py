"""Text Generation Inference 3.3: every sharded size must divide, KV heads are never replicated.

Requirement: the llama family checks heads and KV heads with a text; Qwen2 and Mistral check no KV
heads and fail later; the head of an indivisible vocabulary stays whole on every rank, without an
error; block scales are checked by their count only. Source: commit db931fcf.
"""

from __future__ import annotations

from typing import Any

from tpcheck.engines.base import (
    Engine,
    Finding,
    Rule,
    divisible,
    has_kv_heads,
    quantized_as,
    width_fix,
)
from tpcheck.engines.facts import Facts, ceil_div, chunks
from tpcheck.engines.formats import Formats, names, reading
from tpcheck.json_reader import brief

_WEIGHTS = "server/text_generation_server/utils/weights.py"
_LLAMA = "server/text_generation_server/models/custom_modeling/flash_llama_modeling.py"
_SHARDED = "The choosen size {value} is not compatible with sharding on {tp} shards"
_LATE_KV = ("qwen2", "mistral")
_FALCON = ("falcon", "RefinedWeb")


FORMATS = Formats(
    "server/text_generation_server/models/__init__.py:448-466; utils/weights.py",
    names(
        "gptq gptq_marlin awq awq_marlin exl2 fp8 fbgemm_fp8 compressed-tensors eetq marlin"
        " bitsandbytes_nf4 bitsandbytes_fp4"
    ),
    refuses=names("mxfp4 mxfp8 nvfp4 modelopt_fp4 exl3 gguf hqq aqlm vptq spqr higgs"),
    why="quant_method={method} is only warned about, and the weights it names are not there",
)


_OWN_MODELS = frozenset(
    "deepseek_v2 deepseek_v3 llama llama4 llama4_text phi3 granite gemma gemma2 gemma3 gemma3_text"
    " cohere dbrx mamba mistral mixtral gpt_bigcode phi phimoe phi-msft baichuan falcon RefinedWeb"
    " RefinedWebModel starcoder2 qwen2 qwen2_vl qwen2_vl_text qwen2_5_vl qwen2_5_vl_text opt t5"
    " santacoder galactica bloom mpt gpt2 gpt_neox gptj idefics idefics2 idefics3 mllama"
    " mllama_text_model paligemma llava_next".split()
)
"""Model types with code of TGI's own; the others are transformers 4.51's, with its plans."""


def _unknown_model(facts: Facts) -> str | None:
    if facts.model_type is None or facts.model_type in _OWN_MODELS:
        return None
    return (
        f"tgi has no code of its own for model_type={brief(facts.model_type)}: transformers 4.51's"
        " model and plan run it, which are not known here; planned as if it were llama's"
    )


def _checks_kv(facts: Facts) -> bool:
    return has_kv_heads(facts) and facts.model_type not in (*_LATE_KV, *_FALCON)


def _is_falcon_groups(facts: Facts) -> bool:
    return facts.model_type in _FALCON and (facts.num_key_value_heads or 1) > 1


def _is_packed(facts: Facts) -> bool:
    return facts.model_type == "phi3" or facts.tensor == "qkv_proj"


def _falcon(facts: Facts, tp_size: int) -> Finding | None:
    groups = facts.num_key_value_heads
    assert groups is not None
    text = None
    if tp_size > groups:
        text = "Tensor Parallelism is not implemented for world_size > n groups"
    elif groups % tp_size:
        text = f"Tensor Parallelism is not implemented for {groups} not divisible by {tp_size}"
    return Finding("error", text, text) if text else None


def _late_kv(facts: Facts, tp_size: int) -> Finding | None:
    kv_heads = facts.num_key_value_heads
    assert kv_heads is not None
    if kv_heads % tp_size == 0:
        return None
    why = "dividing by its zero KV heads a rank" if kv_heads < tp_size else "sharding k_proj"
    reason = f"num_key_value_heads={kv_heads} is not checked; {why} fails at tp_size={tp_size}"
    return Finding("error", reason)


def _packed(facts: Facts, tp_size: int) -> Finding | None:
    for linear in facts.linears:
        if linear.style == "columns" and any(part.size % tp_size for part in linear.parts):
            text = f"Prepacked tensor cannot be sharded across {tp_size} shards"
            local = linear.local_out(tp_size)
            return Finding("error", text, text, fix=width_fix(facts, tp_size, linear.name, local))
    return None


def _blocks(facts: Facts, tp_size: int) -> Finding | None:
    assert facts.block is not None
    for linear in facts.linears:
        if not facts.quantized(linear):
            continue
        sizes = [part.size for part in linear.parts] if linear.style == "columns" else []
        axis = 0 if linear.style == "columns" else 1
        for size in sizes or [linear.in_features or 0]:
            found = _scale_rows(facts, tp_size, linear.name, size, facts.block[axis])
            if found and found.outcome != "ok":
                return found
    return _scale_sizes(facts, tp_size)


def _scale_rows(facts: Facts, tp_size: int, name: str, size: int, block: int) -> Finding | None:
    blocks, local = ceil_div(size, block), size // tp_size
    if tp_size == 1 or size == 0:
        return None
    fix = width_fix(facts, tp_size, name, local)
    if blocks % tp_size:
        text = _SHARDED.format(value=blocks, tp=tp_size)
        return Finding("error", text, text, fix=fix)
    if local % block == 0:
        return None
    per_rank = [blocks // tp_size] * tp_size
    reason = (
        f"{name}: {local} rows a rank are {local / block:g} blocks of {block}, but"
        f" {blocks // tp_size} scale rows go to each: misaligned, without an error"
    )
    return Finding("silent_wrong", reason, None, {"per_rank": per_rank, "even": True}, fix)


def _scale_sizes(facts: Facts, tp_size: int) -> Finding | None:
    """Return the scale rows of the one weight that is asked about."""
    rows = [linear for linear in facts.linears if linear.style == "rows"]
    if facts.tensor is None or not rows or facts.block is None:
        return None
    blocks = ceil_div(rows[0].in_features or 0, facts.block[1])
    sizes = {"per_rank": [blocks // tp_size] * tp_size, "even": True}
    return Finding("ok", f"{rows[0].name}: {blocks} blocks over {tp_size} ranks", None, sizes)


def _groups(facts: Facts, tp_size: int) -> Finding | None:
    quant = facts.quant
    if quant is None or not quant.group_size or quant.group_size < 0 or quant.desc_act:
        return None
    kept = None
    for linear in facts.linears:
        if linear.style != "rows" or not facts.quantized(linear) or linear.in_features is None:
            continue
        groups, local = linear.in_features // quant.group_size, linear.local_in(tp_size) or 0
        fix = width_fix(facts, tp_size, linear.name, local)
        if groups % tp_size:
            text = _SHARDED.format(value=groups, tp=tp_size)
            return Finding("error", text, text, fix=fix)
        if local % quant.group_size:
            text = (
                f"Number of input features ({local}) not divisible by group size"
                f" ({quant.group_size})"
            )
            return Finding("error", text, text, fix=fix)
        sizes = {"per_rank": [groups // tp_size] * tp_size, "even": True}
        kept = Finding("ok", f"{linear.name}: {groups} groups", None, sizes)
    return kept


def _tiles(facts: Facts, tp_size: int) -> Finding | None:
    for linear in facts.linears:
        k, n = linear.local_in(tp_size), linear.local_out(tp_size)
        if not k or not n or not facts.quantized(linear):
            continue
        if (n % 128 == 0 and k % 64 == 0) or (n % 64 == 0 and k % 128 == 0):
            continue
        text = (
            "The GPTQ Marlin kernel does not have a valid thread configuration for weight matrix"
            f" with shape ({n}, {k}). The shape elements must be divisible by (128, 64) or"
            " (64, 128)."
        )
        return Finding("error", text, text)
    return None


def _exl2(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1:
        return None
    text = "Column-packed weights are not supported for exl"
    return Finding("error", text, text)


def _vocab(facts: Facts, tp_size: int) -> Finding | None:
    size = facts.vocab_size
    assert size is not None
    if size % tp_size == 0:
        return None
    rows = chunks(size, tp_size)
    reason = f"vocab_size={size}: the whole head on each rank; embedding rows {rows[0]}..{rows[-1]}"
    return Finding("replicate", reason)


def _vocab_sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    size = facts.vocab_size
    assert size is not None
    even = size % tp_size == 0
    found = {
        "lm_head_rows_per_rank": size // tp_size if even else size,
        "all_gather": even,
        "outcome": "shard" if even else "replicate",
    }
    return {"vocab": found}


def _packed_sizes(facts: Facts, tp_size: int) -> dict[str, Any] | None:
    if facts.tensor is None or facts.quant is not None or not facts.linears:
        return None
    linear = facts.linears[0]
    whole = linear.out_features if linear.style == "columns" else linear.in_features or 0
    return {"per_rank": [whole // tp_size] * tp_size, "even": True}


def _sharded(field: str, area: str) -> Rule:
    return divisible("tgi.sharded", field, f"{_WEIGHTS}:218-335", text=_SHARDED, area=area)


def _expert_blocks(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.moe_intermediate_size
    assert width is not None
    assert facts.block is not None
    return _scale_rows(facts, tp_size, "experts", width, facts.block[0])


RULES = (
    reading("tgi", FORMATS),
    divisible(
        "tgi.heads",
        "num_attention_heads",
        f"{_LLAMA}:167-171",
        text="`num_heads` must be divisible by `num_shards` (got `num_heads`: {value} and"
        " `num_shards`: {tp}",
    ),
    Rule(
        "tgi.falcon_groups",
        "server/text_generation_server/models/custom_modeling/flash_rw_modeling.py:274,278",
        _falcon,
        ("num_key_value_heads",),
        "model",
        when=_is_falcon_groups,
    ),
    divisible(
        "tgi.kv_heads",
        "num_key_value_heads",
        f"{_LLAMA}:172-176",
        text="`num_key_value_heads` must be divisible by `num_shards` (got"
        " `num_key_value_heads`: {value} and `num_shards`: {tp}",
        when=_checks_kv,
    ),
    Rule(
        "tgi.kv_zero",
        "server/text_generation_server/models/custom_modeling/flash_qwen2_modeling.py",
        _late_kv,
        ("num_key_value_heads",),
        "model",
        when=lambda facts: facts.model_type in _LATE_KV,
    ),
    Rule("tgi.packed", f"{_WEIGHTS}:314-316", _packed, when=_is_packed),
    _sharded("intermediate_size", "gate_up_proj"),
    _sharded("intermediate_size", "down_proj"),
    _sharded("shared_expert_intermediate_size", "gate_up_proj"),
    _sharded("moe_intermediate_size", "experts"),
    Rule(
        "tgi.fp8_block",
        f"server/text_generation_server/layers/fp8.py; {_WEIGHTS}:275",
        _blocks,
        ("quant",),
        when=lambda facts: facts.block is not None,
    ),
    Rule(
        "tgi.fp8_block",
        f"server/text_generation_server/layers/fp8.py; {_WEIGHTS}:275",
        _expert_blocks,
        ("quant", "moe_intermediate_size"),
        "experts",
        when=lambda facts: facts.block is not None,
    ),
    Rule(
        "tgi.gptq_row",
        "server/text_generation_server/layers/gptq; layers/marlin/gptq.py:326",
        _groups,
        ("quant",),
        when=quantized_as("gptq", "gptq_marlin", "awq"),
    ),
    Rule(
        "tgi.marlin_tile",
        "server/text_generation_server/layers/marlin/gptq.py:479",
        _tiles,
        ("quant",),
        when=quantized_as("gptq_marlin", "gptq"),
    ),
    Rule(
        "tgi.exl2",
        "server/text_generation_server/layers/exl2.py:67",
        _exl2,
        ("quant",),
        "model",
        when=quantized_as("exl2"),
    ),
    Rule(
        "tgi.lm_head",
        "server/text_generation_server/layers/tensor_parallel.py:43-74",
        _vocab,
        ("vocab_size",),
        "lm_head",
        refuses=False,
    ),
)

ENGINE = Engine(
    "tgi",
    "3.3.7 (db931fcf)",
    RULES,
    (("lm_head", ("vocab_size",), _vocab_sizes), ("any", (), _packed_sizes)),
    unknown_format=FORMATS.is_unknown,
    unknown_model=_unknown_model,
)
