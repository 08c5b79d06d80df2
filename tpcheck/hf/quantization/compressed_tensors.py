"""compressed-tensors: one scheme for all layers, of weights and perhaps of their inputs.

Requirement: as in the package. Formats say how numbers are packed, arguments which numbers they
are and what shares a scale; both are read, and what contradicts is refused.
"""

from __future__ import annotations

from typing import Any

from tpcheck.hf.fields import Config
from tpcheck.hf.quantization.fields import (
    STATIC,
    block,
    count,
    flag,
    refuse_unknown,
    refuse_unless,
    refused,
)
from tpcheck.hf.quantization.lists import all_but
from tpcheck.quantization import Quantization

KNOWN = (
    *("quant_method", "config_groups", "format", "global_compression_ratio", "ignore"),
    *("kv_cache_scheme", "quantization_status", "version"),
)
_GROUP = ("targets", "weights", "input_activations", "format")
_ARGUMENTS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)
_STORED = {
    ("pack-quantized", "int", 4): "pack-quantized",
    ("pack-quantized", "int", 8): "pack-quantized",
    ("float-quantized", "float", 8): "fp8",
    ("naive-quantized", "float", 8): "fp8",
    ("int-quantized", "int", 8): "int8",
    ("naive-quantized", "int", 8): "int8",
    ("mxfp4-pack-quantized", "float", 4): "mxfp4",
    ("nvfp4-pack-quantized", "float", 4): "nvfp4",
}
"""Formats of Quantization by compressed-tensors' own format, and the type and bits of weights."""


def read_compressed_tensors(fields: Config) -> Quantization:
    """Return what a compressed-tensors config says."""
    refuse_unless(fields, "quantization_status", "compressed", why=": weights are dense before")
    scheme = _one_scheme(fields)
    weights, inputs = scheme["weights"], scheme.get("input_activations")
    stored, bits = _stored(scheme.get("format") or fields.get("format"), weights)
    rows, group = _shared(weights, stored)
    return Quantization(
        stored,
        group_size=group,
        block_rows=rows,
        bits=bits,
        symmetric=flag(weights, "symmetric", True),
        desc_act=_ordered(weights),
        activations="none" if inputs is None else _activations(inputs, stored, group),
        kv_cache=_kv_cache(fields.get("kv_cache_scheme")),
        skip=all_but(scheme["targets"], fields.get("ignore")),
    )


def _one_scheme(fields: Config) -> dict[str, Any]:
    """Return the scheme of all config_groups, with the targets of all of them."""
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refused("config_groups", groups, "an object of groups")
    first_name, first = next(iter(groups.items()))
    targets: list[Any] = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise refused(where, group, "a group with weights and targets")
        refuse_unknown(group, _GROUP, f"{where}.")
        for part in ("weights", "input_activations", "format"):
            if isinstance(group.get(part), dict):
                refuse_unknown(group[part], _ARGUMENTS, f"{where}.{part}.")
            if group.get(part) != first.get(part):
                why = ": the reference decoder has one kind of quantization"
                raise refused(f"{where}.{part}", group.get(part), f"as in {first_name}", why)
        targets += group.get("targets") or []
    return {**first, "targets": targets}


def _stored(format_: object, weights: Config) -> tuple[str, int]:
    formats = dict.fromkeys(format_ for format_, _, _ in _STORED)
    if format_ not in formats:
        raise refused("format", format_, f"one of {', '.join(formats)}")
    type_, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    if (format_, type_, bits) not in _STORED:
        own = [f"{type_}{bits}" for one, type_, bits in _STORED if one == format_]
        raise refused("weights", f"{type_}{bits}", f"{' or '.join(own)} where format={format_!r}")
    return _STORED[format_, type_, bits], bits


def _shared(weights: Config, stored: str) -> tuple[int, int]:
    """Return how many output and input features share a scale, 0 for all."""
    refuse_unless(weights, "dynamic", False)
    group, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if (strategy == "tensor_group") != (stored == "nvfp4"):
        expected = "tensor_group for nvfp4, and for nothing else"
        raise refused("weights.strategy", strategy, expected)
    match strategy:
        case "tensor":
            return 0, 0
        case "channel":
            return 1, 0
        case "group" | "tensor_group":
            return 1, count("weights.group_size", group)
        case "block":
            return block("weights.block_structure", weights.get("block_structure"))
    raise refused("weights.strategy", strategy, "tensor, channel, group or block")


def _ordered(weights: Config) -> bool:
    """Whether groups are looked up; `weight` and `static` only change how codes are chosen."""
    order = weights.get("actorder")
    if order not in (None, False, True, "weight", "static", "group", "dynamic"):
        raise refused("weights.actorder", order, "null, weight or group")
    return order in (True, "group", "dynamic")


def _activations(inputs: Any, stored: str, group: int) -> str:
    where = "input_activations"
    if not isinstance(inputs, dict):
        raise refused(where, inputs, "an object of fields")
    if inputs.get("dynamic") is not True:
        raise refused(f"{where}.dynamic", inputs.get("dynamic", False), "True", STATIC)
    number = (inputs.get("type", "int"), inputs.get("num_bits", 8))
    same = {"fp8": ("float", 8), "int8": ("int", 8)}.get(stored)
    if number != same:
        expected = "null" if same is None else f"{same[0]}{same[1]} or null"
        raise refused(where, f"{number[0]}{number[1]}", expected, f" where weights are {stored}")
    if not flag(inputs, "symmetric", True):
        raise refused(f"{where}.symmetric", False, "True")
    strategy, size = inputs.get("strategy"), inputs.get("group_size")
    if strategy == "token":
        return "token"
    if strategy == "group" and size == group:
        return "group"
    if strategy == "group":
        raise refused(f"{where}.group_size", size, f"the weights' own, {group}")
    raise refused(f"{where}.strategy", strategy, "token or group")


def _kv_cache(scheme: Any) -> str:
    where = "kv_cache_scheme"
    if scheme is None:
        return "none"
    if not isinstance(scheme, dict):
        raise refused(where, scheme, "an object of fields")
    refuse_unknown(scheme, _ARGUMENTS, f"{where}.")
    needed = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
    for name, value in needed.items():
        if scheme.get(name, value) != value:
            raise refused(f"{where}.{name}", scheme[name], repr(value))
    strategies = {"tensor": "tensor", "attn_head": "head"}
    if scheme.get("strategy") not in strategies:
        raise refused(f"{where}.strategy", scheme.get("strategy"), "tensor or attn_head")
    return strategies[scheme["strategy"]]
