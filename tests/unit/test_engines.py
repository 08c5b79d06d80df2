"""Every engine against what it was seen to do: outcome, sizes and its own words, case by case.

The cases were taken from the engines' own code (tests/data/engine_cases.json says how). A case is a
whole config, a fragment, or one weight; `config_of` says it in the words of tpcheck.plan, from the
case's own fields: which weight it is about, on which card, and what the model's name implies.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tpcheck.planning import ENGINE_NAMES, PlanResult, plan

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "engine_cases.json").read_text(encoding="utf-8")
)["cases"]

HIDDEN = {
    "DeepSeek-V3": 7168,
    "Qwen3-30B-A3B": 2048,
    "Qwen3-235B-A22B": 4096,
    "Falcon-7B": 4544,
    "Qwen2.5-0.5B": 896,
    "Llama-3.2-1B": 2048,
}
HEADS = {"Qwen3-30B-A3B": 32, "Qwen3-235B-A22B": 64, "DeepSeek-V3": 128, "Mixtral-8x7B": 32}
"""Facts of the models that fragments leave out."""

TINY: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 128},
    "gemma2": {"intermediate_size": 128, "tie_word_embeddings": True},
    "qwen2": {"intermediate_size": 128, "vocab_size": 67},
    "phi3": {"intermediate_size": 128, "vocab_size": 67},
    "deepseek_v3": {"intermediate_size": 128, "kv_lora_rank": 16, "v_head_dim": 16},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 128},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 64},
}
"""The tiny models of the transformers cases: what stays the same from case to case."""

TENSORS = {"row": "o_proj", "col": "qkv_proj", "gate_up": "gate_up_proj", "qkv": "qkv_proj"}

NOT_SIZES = set(
    "error_type error_text stage all_violations note rank maxdiff full_tensor_ok cc act layer also"
    " maxdiff_vs_tp1_fp32 ref_absmax qkv_linear_would_replicate kv_mode gptq_variant assumption"
    " awq_fallback_check".split()
)
"""What a case says besides sizes: how it was seen, and what was measured."""


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """Return the config that says a case in the words of tpcheck.plan."""
    config = dict(case["config"])
    model, engine, details = case["model"], case["engine"], case["details"]
    config.update(_run_of(details))
    if engine == "transformers":
        config = {**_tiny(model, config), **config}
    elif engine == "pytorch-dtensor":
        config.update(_dimension(config))
    elif engine == "deepspeed":
        config["tensor"] = details["layer"] if "layer" in details else None
        config.setdefault("head_dim", 64 if "Falcon" in model else 128)
        if "num_attention_heads" not in config and "hidden_size" not in config:
            config.setdefault("hidden_size", _fact(HIDDEN, model))
    elif engine == "tgi" and "packed" in model:
        config["model_type"] = "phi3"
    elif engine == "tensorrt-llm" and "block" in config:
        config["model_type"] = "deepseek_v3"
    elif engine == "vllm" and model.startswith("gpt-oss-20b") and "mxfp4_block" not in config:
        config["model_type"] = "gpt_oss"
    if engine in ("vllm", "sglang"):
        config.update(_weight_of(model, details, config))
    if "num_experts" in config:
        config.setdefault("num_attention_heads", _fact(HEADS, model))
    return {name: value for name, value in config.items() if value is not None}


def _run_of(details: dict[str, Any]) -> dict[str, Any]:
    run = {}
    if "cc" in details:
        run["compute_capability"] = details["cc"]
    if "act" in details:
        run["torch_dtype"] = details["act"]
    return run


def _fact(table: dict[str, int], model: str) -> int | None:
    return next((value for name, value in table.items() if model.startswith(name)), None)


def _tiny(model: str, config: dict[str, Any]) -> dict[str, Any]:
    if not model.startswith("tiny "):
        return {}
    kind = model.split()[1]
    common = {"hidden_size": 64, "head_dim": 16, "vocab_size": 64, "torch_dtype": "float32"}
    return {"model_type": kind, **common, **TINY.get(kind, {})}


def _dimension(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("kind") == "embed":
        return {"hidden_size": 8}
    said = re.fullmatch(r"(.*) (\d+)(?: \((\d+) (kv )?heads.*\))?", config.get("dim", ""))
    if said is None:
        return {}
    size, heads = int(said[2]), said[3] and int(said[3])
    if not heads:
        return {"sharded_dim": size}
    name = "num_key_value_heads" if said[4] else "num_attention_heads"
    return {name: heads, "head_dim": size // heads}


def _weight_of(model: str, details: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return which weight a case is about, and until when it was followed."""
    layer = details.get("layer", "")
    found: dict[str, Any] = {}
    if "K" in config:
        return {"style": "columns" if layer == "col" else "rows"}
    if layer.startswith("QKVParallelLinear"):
        return {"tensor": "qkv_proj", "stage": "load"}
    if "shared expert" in model and "moe_intermediate_size" in config:
        found = {
            "intermediate_size": config["moe_intermediate_size"],
            "moe_intermediate_size": None,
        }
    wide = "intermediate_size" in {**config, **found}
    if layer == "col" and wide:
        one = {"K": config.get("hidden_size"), "N": config["intermediate_size"]}
        return {**one, "hidden_size": None, "intermediate_size": None, "style": "columns"}
    named = [name for name in ("down_proj", "o_proj", "gate_up_proj", "qkv") if name in model]
    if layer in TENSORS:
        found |= {"tensor": "down_proj" if layer == "row" and wide else TENSORS[layer]}
    elif named and "quant" in config and config["quant"] == "fp8":
        found |= {"tensor": named[0]}
    if "tensor" in found:
        found |= {"stage": "create", "hidden_size": config.get("hidden_size", _fact(HIDDEN, model))}
    return found


def result_of(case: dict[str, Any]) -> PlanResult:
    (result,) = plan(config_of(case), engine=case["engine"], tp_sizes=(case["tp"],))
    return result


def flat(sizes: Any) -> dict[str, Any]:
    """Return sizes with those of every weight one level up, as cases of one weight have them."""
    found = dict(sizes)
    for value in sizes.values():
        if isinstance(value, dict):
            found.update({name: inner for name, inner in value.items() if name not in found})
    return found


def plain(name: str, value: Any) -> Any:
    """Return a size of a case in the form of a plan's: rows alone, and weights without biases."""
    if name == "per_rank" and isinstance(value, list) and isinstance(value[0], list):
        return [rows for rows, _ in value]
    if name == "rank0_shapes":
        return {key: shape for key, shape in value.items() if not key.endswith("bias")}
    return value


def mismatches(case: dict[str, Any], result: PlanResult) -> list[str]:
    """Return where a plan and a case differ; empty when the case is reproduced."""
    found = []
    if result.outcome != case["outcome"]:
        found.append(f"outcome={result.outcome} ({result.reason}), expected {case['outcome']}")
    details = case["details"]
    if "error_text" in details and result.error_text != details["error_text"]:
        found.append(f"error_text={result.error_text!r}, expected {details['error_text']!r}")
    sizes = flat(result.sizes)
    for name, value in details.items():
        if name in NOT_SIZES or (name == "outcome" and case["engine"] != "tgi"):
            continue
        actual, expected = sizes.get(name, "nothing"), plain(name, value)
        if actual != expected:
            found.append(f"{name}={actual}, expected {expected}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case_id"])
def test_an_engine_is_planned_as_it_was_seen(case: dict[str, Any]) -> None:
    result = result_of(case)
    assert mismatches(case, result) == []
    assert result.source.startswith(case["engine"])
    legal = case["outcome"] not in ("error", "late_error", "silent_wrong")
    assert (case["tp"] in result.legal_tp_sizes) == (legal and case["tp"] <= 64)


def test_the_share_of_cases_reproduced_is_all_of_them_for_every_engine() -> None:
    seen = Counter(case["engine"] for case in CASES)
    same = Counter(case["engine"] for case in CASES if not mismatches(case, result_of(case)))
    assert set(seen) == set(ENGINE_NAMES) - {"reference"}
    assert {name: f"{same[name]}/{count}" for name, count in seen.items()} == {
        name: f"{count}/{count}" for name, count in seen.items()
    }


def test_a_wrong_answer_would_be_seen() -> None:
    case = next(case for case in CASES if case["case_id"] == "vllm-000")
    worse = {**case, "details": {**case["details"], "vocab": {"padded": 1}}, "outcome": "pad"}
    assert len(mismatches(worse, result_of(case))) == 2
