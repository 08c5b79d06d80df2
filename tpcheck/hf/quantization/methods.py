"""The methods with fields of their own: fp8, GPTQ, AWQ, and MXFP4 as gpt-oss has it.

Requirement: as in the package. Each method has its reader and the fields that the reader knows;
those of tools say how codes were chosen, or what to run them with, and change no function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcheck.hf.fields import Config
from tpcheck.hf.quantization.fields import (
    STATIC,
    block,
    count,
    flag,
    group_size,
    refuse_unless,
    refused,
)
from tpcheck.hf.quantization.lists import matching, only, skipped_by_transformers
from tpcheck.quantization import Quantization

Reader = Callable[[Config], Quantization]


def _fp8(fields: Config) -> Quantization:
    """DeepSeek's and Qwen's blocks; one scale per tensor where weight_block_size is null."""
    refuse_unless(fields, "fmt", "e4m3")
    refuse_unless(fields, "expert_dtype", "fp8")
    rounded = ": the reference decoder does not round scales to powers of two"
    refuse_unless(fields, "scale_fmt", "float", why=rounded)
    refuse_unless(fields, "activation_scheme", "dynamic", why=STATIC)
    size = fields.get("weight_block_size")
    rows, group = (0, 0) if size is None else block("weight_block_size", size)
    name = "modules_to_not_convert" if _lists(fields) else "ignored_layers"
    return Quantization(
        "fp8",
        group_size=group,
        block_rows=rows,
        activations="group" if group else "token",
        skip=skipped_by_transformers(name, fields.get(name)),
    )


def _lists(fields: Config) -> bool:
    return fields.get("modules_to_not_convert") is not None


def _gptq(fields: Config) -> Quantization:
    layout = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise refused("checkpoint_format", layout, "'gptq' or 'gptq_v2'")
    refuse_unless(fields, "pack_dtype", "int32")
    wanted = fields.get("modules_in_block_to_quantize")
    skip = only("modules_in_block_to_quantize", _flat(wanted)) if wanted else ()
    return Quantization(
        "gptq",
        group_size=group_size(fields),
        bits=count("bits", fields.get("bits")),
        symmetric=flag(fields, "sym", True),
        desc_act=flag(fields, "desc_act", False),
        zeros_as_is=layout == "gptq_v2",
        skip=(*skip, *_left_out(fields.get("dynamic"))),
    )


def _left_out(rules: Any) -> tuple[str, ...]:
    """Return the patterns of GPTQModel's `dynamic`: `-:` leaves layers out, `+:` changes them."""
    if not rules:
        return ()
    names = list(rules) if isinstance(rules, dict) else [rules]
    if not all(isinstance(name, str) and name.startswith("-:") for name in names):
        raise refused("dynamic", rules, "of -: rules", ": all layers have one kind of quantization")
    return matching("dynamic", [name.removeprefix("-:") for name in names])


def _flat(wanted: Any) -> list[Any]:
    rows = wanted if isinstance(wanted, list) else [wanted]
    return [name for row in rows for name in (row if isinstance(row, list) else [row])]


def _awq(fields: Config) -> Quantization:
    version = fields.get("version", fields.get("format"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise refused("version", version, "'gemm'", ": the others pack in other orders")
    refuse_unless(fields, "zero_point", True)
    refuse_unless(fields, "desc_act", False)
    name = "modules_to_not_convert"
    return Quantization(
        "awq",
        group_size=group_size(fields),
        bits=count("bits", fields.get("bits")),
        symmetric=False,
        skip=skipped_by_transformers(name, fields.get(name)),
    )


def _mxfp4(fields: Config) -> Quantization:
    """gpt-oss: nothing but experts is ever converted, whatever the list leaves out."""
    name = "modules_to_not_convert"
    skip = skipped_by_transformers(name, fields.get(name))
    return Quantization("mxfp4", group_size=32, skip=("self_attn", *skip))


_GPTQ_TOOLS = (
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "dataset"),
    *("tokenizer", "model_name_or_path", "model_file_base_name", "model_seqlen", "batch_size"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id", "meta"),
    *("max_input_length", "cache_block_outputs", "backend", "quantizer", "act_group_aware"),
    *("disable_exllama", "use_exllama", "exllama_config", "use_cuda_fp16"),
)
METHODS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "fp8": (
        _fp8,
        (
            *("quant_method", "fmt", "expert_dtype", "scale_fmt", "activation_scheme"),
            *("weight_block_size", "modules_to_not_convert", "ignored_layers"),
        ),
    ),
    "gptq": (
        _gptq,
        (
            *("quant_method", "checkpoint_format", "format", "pack_dtype", "group_size", "bits"),
            *("sym", "desc_act", "modules_in_block_to_quantize", "dynamic", *_GPTQ_TOOLS),
        ),
    ),
    "awq": (
        _awq,
        (
            *("quant_method", "version", "format", "zero_point", "group_size", "bits", "sym"),
            *("desc_act", "modules_to_not_convert", "do_fuse", "modules_to_fuse"),
            *("fuse_max_seq_len", *_GPTQ_TOOLS),
        ),
    ),
    "mxfp4": (_mxfp4, ("quant_method", "modules_to_not_convert")),
}
"""How each quant_method is read, and the fields that its reader knows."""
