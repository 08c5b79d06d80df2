"""How many bytes a weight has as it is stored: its values, its scales, zero points and order."""

from __future__ import annotations

from tpcheck.engines.facts import Quant, ceil_div

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8": 1,
}
_RUN = 64
"""Values that share a scale in bitsandbytes."""


def dtype_bytes(dtype: str | None) -> int:
    """Return the bytes of one value; an unknown dtype counts as bfloat16."""
    return DTYPE_BYTES.get(dtype or "bfloat16", 2)


def stored_bits(quant: Quant) -> int | None:
    """Return the bits of one stored weight, None for a method whose form is not known."""
    if quant.method.startswith(("fp8", "mxfp8")) or quant.method in ("fbgemm_fp8", "w8a8_fp8"):
        return 8
    if quant.method.startswith(("gptq", "awq", "wna16", "compressed", "bitsandbytes")):
        return quant.bits
    return 4 if quant.method.startswith(("mxfp4", "nvfp4", "modelopt_fp4")) else None


def scale_bytes(quant: Quant, out: int, into: int) -> int:
    """Return the bytes beside the values of a weight [out, into] that is whole on one rank."""
    if quant.block:
        return 4 * ceil_div(out, quant.block[0]) * ceil_div(into, quant.block[1])
    for prefix, size in (("mxfp", 32), ("nvfp4", 16), ("modelopt_fp4", 16)):
        if quant.method.startswith(prefix):
            return out * ceil_div(into, size)
    if quant.method.startswith("bitsandbytes"):
        return 4 * (ceil_div(out * into, _RUN) if quant.bits == 4 else out)
    if stored_bits(quant) == 8 and not quant.group_size:
        return 4
    groups = ceil_div(into, quant.group_size) if quant.group_size and quant.group_size > 0 else 1
    zeros = 0 if quant.method.startswith("compressed") else ceil_div(groups * out * quant.bits, 8)
    order = 4 * into if quant.method.startswith("gptq") else 0
    return 2 * groups * out + zeros + order
