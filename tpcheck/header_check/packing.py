"""How quantization methods store a weight [out, in]: which tensors, with which dims.

Requirement: a row of the table per method, so that a weight, its scales, zero points and order all
have their shape from the same two logical dims, and are cut by the same map.

Source: AutoGPTQ and AutoAWQ checkpoints (qweight, qzeros, scales, g_idx), DeepSeek-V3 and Qwen3 fp8
(weight_scale_inv), compressed-tensors pack-quantized (weight_packed), gpt-oss (blocks, scales),
ModelOpt NVFP4 (weight_scale_2), bitsandbytes (absmax, quant_map, quant_state).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from tpcheck.engines.facts import Quant
from tpcheck.header_check.dimensions import Block, Dim, Expected, constant

_INT32, _BYTE, _FP8 = ("I32",), ("U8",), ("F8_E4M3", "F8_E4M3FNUZ")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_MXFP4_BLOCK = 32
_ONE = Expected((constant(1),))
"""A number of its own, where tools also write a shape of one."""


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
        by_row = (Expected((out,)), Expected((out, constant(1))))
        scale = Expected((), _SCALES, others=(_ONE, *by_row))
        later = Expected((), _SCALES, optional=True, others=(_ONE,))
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


def _nvfp4(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    """ModelOpt's names; compressed-tensors has the same under other names (`NAMES`)."""
    return {
        "weight": Expected((out, into.packed(2, "byte of two values")), _BYTE),
        "weight_scale": Expected((out, into.packed(_NVFP4_BLOCK, "block")), _FP8),
        "weight_scale_2": Expected((), ("F32",), others=(_ONE,)),
        "input_scale": Expected((), ("F32",), optional=True, others=(_ONE,)),
    }


NAMES = {
    "nvfp4": {
        "weight": "weight_packed",
        "weight_scale_2": "weight_global_scale",
        "input_scale": "input_global_scale",
    },
}
"""Method → what another tool calls the same tensors."""


def _bitsandbytes(quant: Quant, out: Dim, into: Dim) -> dict[str, Expected]:
    """Values in one long run, rows one behind the other, with a scale for so many of them."""
    if quant.bits == 8:
        return {
            "weight": Expected((out, into), ("I8",)),
            "SCB": Expected((out,), ("F32",)),
            "weight_format": Expected((), ("U8",), optional=True),
        }
    count = out.elements * into.elements
    found = {
        "weight": Expected(
            (out, into.packed(2, "byte of two values")), _BYTE, flat=(-(-count // 2), 1)
        ),
        "weight.quant_map": Expected((constant(16),), ("F32",)),
        "weight.nested_absmax": Expected((), ("F32",), optional=True, any_shape=True),
        "weight.nested_quant_map": Expected((constant(256),), ("F32",), optional=True),
    }
    found |= {
        f"weight.quant_state.bitsandbytes__{kind}": Expected(
            (), _BYTE, optional=True, any_shape=True
        )
        for kind in ("nf4", "fp4")
    }
    first, *others = (_run_scales(out, into, size) for size in _BNB_BLOCKS)
    return {**found, "weight.absmax": replace(first, others=tuple(others))}


def _run_scales(out: Dim, into: Dim, run: int) -> Expected:
    """Return the scales of runs that long.

    Where a run does not end with a row, rows are cut as one long dim, so that a run which two ranks
    would share is found.
    """
    shape = (-(-(out.elements * into.elements) // run),)
    if into.elements % run and not into.is_split:
        blocks = (Block(one.split, one.units, one.width * into.elements) for one in out.blocks)
        return Expected((Dim(tuple(blocks), run, "block"),), ("U8", "F32"), flat=shape)
    return Expected((out, into.packed(run, "block")), ("U8", "F32"), flat=shape)


_NVFP4_BLOCK = 16
_BNB_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
"""How many values share a scale in bitsandbytes; the first is its default."""


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
    "nvfp4": Storing(_nvfp4),
    "modelopt_fp4": Storing(_nvfp4),
    "bitsandbytes": Storing(_bitsandbytes),
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
