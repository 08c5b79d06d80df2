"""Units in the last place, for any floating dtype torch can hold.

Requirement: an error is read in ulp of the dtype it happened in; 0.125 is one step of bfloat16 at
16 and a disaster at 0.01.
"""

from __future__ import annotations

import math

import torch


def eps(dtype: torch.dtype | str) -> float:
    """Return the distance from 1 to the next number, 2u.

    Source: torch.finfo.
    """
    return float(torch.finfo(_torch_dtype(dtype)).eps)


def ulp(value: float, dtype: torch.dtype | str) -> float:
    """Return the spacing of `dtype`'s numbers at |value|, subnormals included; 1 for integers.

    Source: IEEE 754-2019, section 3.3; the definition of Goldberg 1991 for a normal number.
    """
    named = _torch_dtype(dtype)
    if not (named.is_floating_point or named.is_complex):
        return 1.0
    info = torch.finfo(named)
    magnitude = max(abs(value), float(info.tiny))
    if not math.isfinite(magnitude):
        return math.inf
    return float(info.eps) * 2.0 ** math.floor(math.log2(magnitude))


def in_ulp(error: float, value: float, dtype: torch.dtype | str) -> float:
    """Return `error` in ulp of `dtype` at `value`.

    Source: the definition of `ulp` above.
    """
    return error / ulp(value, dtype)


def ulps_of(values: torch.Tensor, dtype: torch.dtype | str) -> torch.Tensor:
    """Return `ulp` of every element, float64 of the same shape; elements are finite float64.

    Source: the definition of `ulp` above.
    """
    named = _torch_dtype(dtype)
    if not (named.is_floating_point or named.is_complex):
        return torch.ones_like(values)
    info = torch.finfo(named)
    exponent = torch.frexp(values.abs().clamp_min(float(info.tiny))).exponent - 1
    return float(info.eps) * torch.exp2(exponent.double())


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    named: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return named
