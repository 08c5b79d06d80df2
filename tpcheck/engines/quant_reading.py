"""Read how a checkpoint's weights are quantized, from the spellings that tools write.

Requirement: fp8 blocks, GPTQ and AWQ groups, compressed-tensors, MXFP4 and NVFP4 come out as one
record, whoever wrote the config; an unknown method keeps its name, so that an engine can refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tpcheck.engines.facts import Quant
from tpcheck.errors import PlanError
from tpcheck.json_reader import brief


def read_quant(config: Mapping[str, Any], where: str) -> Quant | None:
    """Return how weights are stored, None where they are not quantized.

    `quantization_config` is the checkpoint's own; `quant` is a method asked for by hand, as an
    engine's --quantization flag does, with `group_size`, `desc_act` and `weight_block_size` beside.

    Raises:
        PlanError: a field is malformed; names it and its value.
    """
    fields = config.get("quantization_config", config.get("compression_config"))
    if fields is not None:
        if not isinstance(fields, Mapping):
            raise PlanError(
                f"{where}: quantization_config={brief(fields)}, but should be an object of fields"
            )
        return _from_checkpoint(fields, f"{where}: quantization_config")
    named = config.get("quant", config.get("quant_method"))
    if named is not None and not isinstance(named, str):
        raise PlanError(f"{where}: quant={brief(named)}, but should be the name of a method")
    block = _block(config.get("weight_block_size", config.get("block")), where)
    if config.get("mxfp4_block") is not None:
        named, block = "mxfp4", None
    if named is None and block is None:
        return None
    words = (named or "").lower().split() or ["fp8"]
    method, bits = _method(words[0])
    size = re.fullmatch(r"(\d+)x(\d+)", words[-1])
    if block is None and size:
        block = (int(size[1]), int(size[2]))
    return Quant(
        method,
        block,
        _group(config.get("group_size"), where),
        bits,
        config.get("desc_act") is True,
        forced=True,
    )


def _from_checkpoint(fields: Mapping[str, Any], where: str) -> Quant:
    named = fields.get("quant_method") or fields.get("quant_algo")
    if not isinstance(named, str):
        raise PlanError(f"{where}.quant_method={brief(named)}, but should be the name of a method")
    method, bits = _method(named.lower())
    if method == "modelopt":
        method = str(fields.get("quant_algo") or "fp8").lower()
    if method == "bitsandbytes" and fields.get("load_in_8bit") is True:
        bits = 8
    ignored = next((fields[name] for name in _IGNORED if fields.get(name)), ())
    if not isinstance(ignored, (list, tuple)):
        raise PlanError(f"{where}: ignored modules={brief(ignored)}, but should be a list of names")
    names = tuple(name for name in ignored if isinstance(name, str))
    if method == "compressed-tensors":
        return _compressed(fields, names, where)
    return Quant(
        method,
        _block(fields.get("weight_block_size"), where),
        _group(fields.get("group_size", fields.get("q_group_size")), where),
        _bits(fields.get("bits", fields.get("w_bit")), bits, where),
        fields.get("desc_act") is True,
        ignored=names,
    )


_IGNORED = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")
"""Where tools list the modules that are not quantized."""


def _compressed(fields: Mapping[str, Any], names: tuple[str, ...], where: str) -> Quant:
    groups = fields.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    if not isinstance(weights, Mapping):
        return Quant("compressed-tensors", ignored=names)
    bits = _bits(weights.get("num_bits"), 4, where)
    if weights.get("type") == "float":
        method = "nvfp4" if bits == 4 else "fp8"
        return Quant(
            method, _block(weights.get("block_structure"), where), bits=bits, ignored=names
        )
    group = _group(weights.get("group_size"), where)
    return Quant("compressed-tensors", None, group, bits, ignored=names)


def _method(word: str) -> tuple[str, int]:
    """Split `gptq-int4` into the method and its bits; other hyphens become underscores."""
    bits = re.fullmatch(r"(gptq|awq|auto[-_]round|marlin)[-_](?:w|int)([1-9]|[12]\d|3[0-2])", word)
    if bits:
        return bits[1].replace("-", "_"), int(bits[2])
    name = word.replace("-", "_")
    if name == "compressed_tensors":
        return "compressed-tensors", 4
    return name, 8 if name == "fp8" else 4


def _block(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return (value, value)
    sizes = value if isinstance(value, (list, tuple)) else ()
    if len(sizes) != 2 or not all(_is_count(size) for size in sizes):
        raise PlanError(
            f"{where}: weight_block_size={brief(value)}, but should be two whole numbers of at"
            f" least 1"
        )
    return (sizes[0], sizes[1])


def _group(value: Any, where: str) -> int | None:
    if value is None:
        return None
    if value != -1 and not _is_count(value):
        raise PlanError(
            f"{where}: group_size={brief(value)}, but should be -1 or a whole number of at least 1"
        )
    return int(value)


_MOST_BITS = 32
"""Codes are packed into words of so many."""


def _bits(value: Any, default: int, where: str) -> int:
    if value is None:
        return default
    if not _is_count(value) or value > _MOST_BITS:
        raise PlanError(
            f"{where}: bits={brief(value)}, but should be a whole number of at least 1 and at most"
            f" {_MOST_BITS}"
        )
    return int(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
