"""The number grids of quantized storage and wires: round to them, and spell them in bits.

Requirement: a quantizer is judged in float64 too, where every operation below float64 counts as a
precision loss of the code under test. So rounding is arithmetic in the tensor's own dtype, never a
cast to the narrow one and back; bits are made only where something is stored.

[One Formula] Every grid is a fixed-point grid per power of two: between 2^e and 2^(e+1) its values
stand 2^(e - mantissa_bits) apart, and below 2^min_exponent they keep the spacing they have there.
Integers are a grid that never gets beyond that lowest spacing, 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Describe the values of one narrow format.

    `bits` is the width of a code. `min` and `max` are the outermost finite values. Values from
    2^min_exponent on have `mantissa_bits` binary digits after the leading one; smaller ones are
    subnormal. `has_infinity` tells whether the codes after the largest finite one begin with
    infinity; `nan_codes` counts the codes at the top that mean NaN.
    """

    name: str
    bits: int
    min: float
    max: float
    mantissa_bits: int
    min_exponent: int
    is_integer: bool = False
    has_infinity: bool = False
    nan_codes: int = 0

    @property
    def has_sign_bit(self) -> bool:
        """Whether the top bit of a code is a sign, so that zero has two codes."""
        return not self.is_integer and self.min < 0


def _integers(name: str, bits: int, lowest: int) -> Grid:
    return Grid(name, bits, lowest, lowest + 2**bits - 1, bits, bits, is_integer=True)


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("float8_e4m3fn", 8, -448.0, 448.0, 3, -6, nan_codes=1),
        Grid("float8_e5m2", 8, -57344.0, 57344.0, 2, -14, has_infinity=True, nan_codes=3),
        Grid("float4_e2m1", 4, -6.0, 6.0, 1, 0),
        Grid("e8m0", 8, 2.0**-127, 2.0**127, 0, -127, nan_codes=1),
        _integers("int8", 8, -128),
        _integers("int6", 6, -32),
        _integers("int4", 4, -8),
        _integers("uint4", 4, 0),
    )
}
"""By name. Symmetric quantizers clamp to ±127, ±31 or ±7 themselves."""


def round_to(x: Tensor, grid: str) -> Tensor:
    """Round every element to the nearest value of the grid, ties to the even one.

    Beyond the outermost values, infinities included, the result is the outermost value; NaN stays
    NaN. Zero keeps its sign on grids that have one. e8m0 holds neither zero nor signs: zero
    becomes 2^-127, anything negative NaN, and a tie goes up, to the even significand.

    Args:
        x: floating point, any shape. float32 and float64 are rounded in their own arithmetic,
            float16 and bfloat16 in float32.
        grid: a key of GRIDS.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        ValueError: the grid is unknown, or x's dtype cannot hold its values; both are named.

    Source: float8: Micikevicius et al. 2022 (arXiv:2209.05433), section 3. float4_e2m1, e8m0: OCP
        Microscaling Formats 1.0, sections 5.3 and 5.4. Measured against ml_dtypes and torch's
        casts, all bfloat16 and float16 inputs: tests/unit/test_grids.py.
    """
    into = _grid_held_by(grid, x.dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    inside = wide.clamp(into.min, into.max)
    step = _spacing(inside, into)
    rounded = torch.round(inside / step) * step
    if into.is_integer:
        rounded = rounded + 0.0  # -0.0 is no integer
    if not into.is_integer and not into.has_sign_bit:
        rounded = rounded.masked_fill(wide < 0, math.nan)
    return rounded.to(x.dtype)


def spacing(x: Tensor, grid: str) -> Tensor:
    """Return the distance between the grid's values from |x| on outwards, inside its range.

    A rounding error is at most half of it.

    Args:
        x: floating point, any shape; beyond the outermost value the spacing at that value counts.
        grid: a key of GRIDS.

    Returns:
        Powers of two, of x's shape and dtype; NaN where x is NaN.

    Raises:
        ValueError: as for round_to.

    Source: the definition of a floating-point format, IEEE 754-2019, section 3.3.
    """
    into = _grid_held_by(grid, x.dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return _spacing(wide.clamp(into.min, into.max), into).to(x.dtype)


def encode(values: Tensor, grid: str) -> Tensor:
    """Return the codes of values that stand on a floating-point grid.

    Args:
        values: floating point, any shape, each a value of the grid; NaN where the grid has one.
        grid: float8_e4m3fn, float8_e5m2, float4_e2m1 or e8m0.

    Returns:
        uint8 of the same shape: the bits of the code, float4's in the low nibble; float8's are
        what `.view(torch.float8_e4m3fn)` reads.

    Raises:
        ValueError: the grid is unknown or of integers, or a value is not on it: round_to first.

    Source: as for round_to.
    """
    into = _float_grid(grid)
    ascending = torch.tensor(_unsigned_values(grid), dtype=torch.float64, device=values.device)
    exact = values.double()
    is_nan = exact.isnan()
    codes = torch.searchsorted(ascending, exact.abs()).clamp_max(len(ascending) - 1)
    fits = (ascending[codes] == exact.abs()) & (into.has_sign_bit | (exact > 0))
    fits |= is_nan & (into.nan_codes > 0)
    if not bool(fits.all()):
        wrong = float(exact[~fits].flatten()[0])
        raise ValueError(f"encode: value={wrong}, but should be on the grid {grid}: use round_to")
    codes = codes.masked_fill(is_nan, _sign_bit(into) - 1)
    if into.has_sign_bit:
        codes = codes + _sign_bit(into) * exact.signbit()
    return codes.to(torch.uint8)


def decode(codes: Tensor, grid: str, dtype: torch.dtype) -> Tensor:
    """Return the values that codes of a floating-point grid stand for.

    Args:
        codes: uint8, any shape; a float8 tensor is read after `.view(torch.uint8)`.
        grid: float8_e4m3fn, float8_e5m2, float4_e2m1 or e8m0.
        dtype: of the result; no operation is in another floating-point dtype.

    Returns:
        A new tensor of the same shape, exact.

    Raises:
        ValueError: the grid is unknown or of integers, a code is too large for it, the codes are
            not uint8, or the dtype cannot hold the grid.

    Source: as for round_to.
    """
    into = _float_grid(grid)
    _grid_held_by(grid, dtype)
    if codes.dtype != torch.uint8:
        raise ValueError(f"decode: codes.dtype={codes.dtype}, but should be torch.uint8")
    if into.bits < 8 and codes.numel() and int(codes.max()) >= 2**into.bits:
        most = 2**into.bits - 1
        raise ValueError(f"decode: code={int(codes.max())}, but should be at most {most} [{grid}]")
    table = torch.tensor(_values(grid), dtype=dtype, device=codes.device)
    return table[codes.int()]


def _spacing(inside: Tensor, grid: Grid) -> Tensor:
    """Return the step at values of the grid's range, exact in their own dtype."""
    normal = inside.abs().clamp_min(2.0**grid.min_exponent)
    power = normal / (torch.frexp(normal).mantissa * 2)
    return power * 2.0**-grid.mantissa_bits


@lru_cache(maxsize=len(GRIDS))
def _values(name: str) -> tuple[float, ...]:
    """Return the value of every code, in code order."""
    grid = GRIDS[name]
    positive = _unsigned_values(name) + (math.nan,) * grid.nan_codes
    return positive + tuple(-value for value in positive) if grid.has_sign_bit else positive


@lru_cache(maxsize=len(GRIDS))
def _unsigned_values(name: str) -> tuple[float, ...]:
    """Return the values of the codes without sign bit, ascending from code 0, but for NaN."""
    grid = GRIDS[name]
    found = []
    for code in range(_sign_bit(grid) - grid.nan_codes - grid.has_infinity):
        exponent, digits = divmod(code, 2**grid.mantissa_bits)
        leading = 1
        if grid.has_sign_bit:  # the lowest exponent code is that of the subnormals
            leading, exponent = int(exponent > 0), max(exponent - 1, 0)
        significand = leading + digits * 2.0**-grid.mantissa_bits
        found.append(significand * 2.0 ** (exponent + grid.min_exponent))
    return (*found, math.inf) if grid.has_infinity else tuple(found)


def _sign_bit(grid: Grid) -> int:
    """Return the code of the sign bit, which is also the number of codes without it."""
    return 1 << (grid.bits - 1 if grid.has_sign_bit else grid.bits)


def _float_grid(name: str) -> Grid:
    grid = _grid(name)
    if grid.is_integer:
        raise ValueError(f"grid={name!r}, but should be of floating point: integers are codes")
    return grid


def _grid_held_by(name: str, dtype: torch.dtype) -> Grid:
    grid = _grid(name)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"dtype={dtype}, but should be a float of 16 bits or more [{name}]")
    if grid.max > torch.finfo(dtype).max:
        raise ValueError(f"dtype={dtype}, but should hold {grid.max:.3g}: use float32 [{name}]")
    return grid


def _grid(name: str) -> Grid:
    if name not in GRIDS:
        raise ValueError(f"grid={name!r}, but should be one of {', '.join(GRIDS)}")
    return GRIDS[name]
