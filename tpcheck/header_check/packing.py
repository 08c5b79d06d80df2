"""How quantization methods store a weight [out, in]: which tensors, with which dims.

Requirement: a row of the table per method, so that a weight, its scales, zero points and order all
have their shape from the same two logical dims, and are cut by the same map.

Source: AutoGPTQ and AutoAWQ checkpoints (qweight, qzeros, scales, g_idx), DeepSeek-V3 and Qwen3 fp8
(weight_scale_inv), compressed-tensors pack-quantized (weight_packed), gpt-oss (blocks, scales).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from tpcheck.engines.facts import Quant
from tpcheck.header_check.dimensions import Dim, Expected, constant

_INT32, _BYTE, _FP8 = ("I32",), ("U8",), ("F8_E4M3", "F8_E4M3FNUZ")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_MXFP4_BLOCK = 32


class Storing(NamedTuple):
    """How a method stores a weight: its name's end → what is there instead."""

    stores: Callable[[Quant, Dim, Dim], Mapping[str, Expected]]
    raw: bool = False


def _gptq(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    pack, group = 32 // quant.bits, quant.group_size or -1
    packed_out, packed_in = out.packed(pack, "packed int32"), into.packed(pack, "packed int32")
    groups = into.packed(group, "group")
    return {
        "qweight": Expected((packed_in, out), _INT32),
        "qzeros": Expected((groups, packed_out), _INT32),
        "scales": Expected((groups, out)),
        "g_idx": Expected((into,), _INT32, optional=not quant.desc_act),
    }


def _awq(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    packed = out.packed(32 // quant.bits, "packed int32")
    groups = into.packed(quant.group_size or -1, "group")
    return {
        "qweight": Expected((into, packed), _INT32),
        "qzeros": Expected((groups, packed), _INT32),
        "scales": Expected((groups, out)),
    }


def _fp8(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    stored = {"weight": Expected((out, into), _FP8)}
    if not quant.block:
        scale = Expected((), any_shape=True)
        later = Expected((), optional=True, any_shape=True)
        return {**stored, "weight_scale": scale, "input_scale": later, "activation_scale": later}
    rows, columns = (
        dim.packed(size, "block") for dim, size in zip((out, into), quant.block, strict=True)
    )
    return {**stored, "weight_scale_inv": Expected((rows, columns), _SCALES)}


def _compressed(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    pack, groups = 32 // quant.bits, into.packed(quant.group_size or -1, "group")
    return {
        "weight_packed": Expected((out, into.packed(pack, "packed int32")), _INT32),
        "weight_scale": Expected((out, groups)),
        "weight_shape": Expected((constant(2),), ("I64", "I32"), optional=True),
        "weight_zero_point": Expected(
            (out.packed(pack, "packed int32"), groups), _INT32, optional=True
        ),
        "weight_g_idx": Expected((into,), _INT32, optional=not quant.desc_act),
    }


def _mxfp4(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    blocks = into.packed(_MXFP4_BLOCK, "block")
    return {
        "_blocks": Expected((out, blocks, constant(_MXFP4_BLOCK // 2)), _BYTE),
        "_scales": Expected((out, blocks), _BYTE),
    }


_METHODS = {
    "gptq": Storing(_gptq),
    "gptq_marlin": Storing(_gptq),
    "awq": Storing(_awq),
    "awq_marlin": Storing(_awq),
    "fp8": Storing(_fp8),
    "compressed-tensors": Storing(_compressed),
    "mxfp4": Storing(_mxfp4, raw=True),
}


def storing(quant: Quant) -> Storing | None:
    """Return how a method stores weights, None for one that is not known here."""
    known = _METHODS.get(quant.method)
    return None if known is not None and quant.bits not in (2, 4, 8) else known


def is_left_out(name: str, quant: Quant) -> bool:
    """Whether a config's list of unquantized modules names this tensor's module.

    `mlp.gate` is part of `model.layers.0.mlp.gate`, and not of `mlp.gate_proj`.
    """
    names, patterns = _ignored(quant.ignored)
    module = name.removesuffix(".weight")
    steps = module.split(".")
    parts = (
        ".".join(steps[start:stop])
        for start in range(len(steps))
        for stop in range(start + 1, len(steps) + 1)
    )
    return any(part in names for part in parts) or any(one.search(module) for one in patterns)


@lru_cache(maxsize=16)
def _ignored(entries: tuple[str, ...]) -> tuple[frozenset[str], tuple[re.Pattern[str], ...]]:
    """Return plain names, which are many where each layer is named, and patterns."""
    patterns = []
    for entry in entries:
        try:
            if entry.startswith("re:"):
                patterns.append(re.compile(f"^(?:{entry[3:]})"))
            elif "*" in entry:
                named = re.escape(entry).replace(r"\*", "[^.]*")
                patterns.append(re.compile(rf"(?:^|\.){named}(?:$|\.)"))
        except re.error:
            continue  # no tool could read it either: the tensors decide
    return frozenset(entries), tuple(patterns)
