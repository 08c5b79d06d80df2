"""The number grids, against a search over all values, ml_dtypes and torch's own float8 casts.

The search takes every input. The libraries answer overflow, and what a grid cannot hold, each in
its own way: there the expected value is put by hand, the outermost value or NaN (see round_to).
Two kinds of input are left to the search alone, see `cast_rounds_once`.
"""

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpcheck.numerics.grids import GRIDS, decode, encode, round_to, spacing

ML_DTYPES = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
TORCH_DTYPES = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
}
INTEGERS = {"int8": (-128, 127), "int6": (-32, 31), "int4": (-8, 7), "uint4": (0, 15)}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HELD = [
    pytest.param(grid, dtype, id=f"{grid}-{str(dtype).removeprefix('torch.')}")
    for grid in GRIDS
    for dtype in DTYPES
    if (grid, dtype) != ("e8m0", torch.float16)
]
"""Every grid in every dtype that reaches its ends."""


@pytest.fixture(autouse=True)
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


def all_codes(grid: str) -> Tensor:
    return torch.arange(2 ** GRIDS[grid].bits, dtype=torch.uint8)


def values_of(grid: str) -> list[float]:
    """Return the finite values of the grid, ascending, zero once."""
    if grid in INTEGERS:
        lowest, highest = INTEGERS[grid]
        return [float(value) for value in range(lowest, highest + 1)]
    values = all_codes(grid).numpy().view(ML_DTYPES[grid]).astype(np.float64)
    return sorted({float(value) for value in values if math.isfinite(value)})


def inputs(grid: str, dtype: torch.dtype) -> Tensor:
    """Return every 16-bit number, or a million bit patterns, and all ties with their neighbours."""
    if dtype.itemsize == 2:
        return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    words = 2**20 * dtype.itemsize // 4
    patterns = torch.randint(-(2**31), 2**31, (words,), generator=generator).to(torch.int32)
    values = torch.tensor(values_of(grid), dtype=torch.float64)
    scaled = torch.randn(2**18, generator=generator, dtype=torch.float64) * values.abs().max() / 2
    lowest = 2.0 ** (GRIDS[grid].min_exponent - GRIDS[grid].mantissa_bits)
    tiny = torch.randn(2**16, generator=generator, dtype=torch.float64) * lowest
    ties = (values[1:] + values[:-1]) / 2
    ends = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    made = torch.cat([values, ties, ties / 2, scaled, tiny, ends]).to(dtype)
    up, down = made.nextafter(torch.full_like(made, math.inf)), made.nextafter(-made.abs() - 1)
    return torch.cat([patterns.view(dtype), made, up, down])


def saturated(x: np.ndarray, rounded: np.ndarray, grid: str) -> np.ndarray:
    """Return what a cast made of x, with the grid's ends and NaN as round_to promises them."""
    values = values_of(grid)
    ended = np.where(x > values[-1], values[-1], np.where(x < values[0], values[0], rounded))
    if grid == "e8m0":
        ended = np.where(x < 0, np.nan, ended)
    return np.where(np.isnan(x), np.nan, ended)


def nearest(x: np.ndarray, grid: str) -> np.ndarray:
    """Search all values for the nearest one; float64 holds values, ties and inputs exactly."""
    values = np.array(values_of(grid))
    above = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    tie = low + (high - low) / 2
    even = np.array([_has_even_code(value, grid) for value in values.tolist()])
    up = (x > tie) | ((x == tie) & even[above])
    found = np.where(up, high, low)
    return found + 0.0 if grid in INTEGERS else np.copysign(found, x)


def _has_even_code(value: float, grid: str) -> bool:
    if grid in INTEGERS:
        return value % 2 == 0
    if grid == "e8m0":
        return True  # a power of two counts as 1, its double as 2: `up` reads the upper one
    return int(np.array(value).astype(ML_DTYPES[grid]).view(np.uint8)) % 2 == 0


def cast_rounds_once(x: Tensor, grid: str) -> Tensor:
    """Return the inputs that the libraries' casts round correctly.

    Both take float64 through float32 and round twice (17 + 2^-40 is no tie, but becomes one), and
    both make 2^-126 of anything above 2^-127 (measured with the versions in constraints.txt).
    """
    if grid == "e8m0":
        x = x[~((x > 2.0**-127) & (x < 1.5 * 2.0**-127))]
    return x[(x.float().to(x.dtype) == x) | x.isnan()]


def assert_same(actual: Tensor, expected: np.ndarray, x: Tensor) -> None:
    """Assert equal bits, all NaN being one."""
    wanted = torch.from_numpy(expected.astype(np.float64))
    same = (actual.double() == wanted) & (actual.signbit() == wanted.signbit())
    wrong = ~(same | (actual.isnan() & wanted.isnan()))
    at = wrong.nonzero()[:1].flatten().tolist()
    assert not wrong.any(), f"{int(wrong.sum())} wrong: {x[at]} to {actual[at]}, not {wanted[at]}"


@pytest.mark.parametrize("grid", ML_DTYPES)
def test_every_code_stands_for_the_value_ml_dtypes_says(grid):
    expected = all_codes(grid).numpy().view(ML_DTYPES[grid]).astype(np.float64)
    assert_same(decode(all_codes(grid), grid, torch.float64), expected, all_codes(grid))


@pytest.mark.parametrize("grid", TORCH_DTYPES)
def test_every_code_stands_for_the_value_torch_says(grid):
    expected = all_codes(grid).view(TORCH_DTYPES[grid]).float().numpy()
    assert_same(decode(all_codes(grid), grid, torch.float32), expected, all_codes(grid))


@pytest.mark.parametrize("grid", ML_DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_code_comes_back_from_its_value(grid, dtype):
    codes = all_codes(grid)
    values = decode(codes, grid, dtype)
    assert values.dtype == dtype
    back = encode(values, grid)
    assert back.dtype == torch.uint8
    assert torch.equal(back[~values.isnan()], codes[~values.isnan()])
    assert decode(back, grid, dtype)[values.isnan()].isnan().all()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_ends_of_a_grid_are_its_outermost_values(grid):
    values = values_of(grid)
    assert (GRIDS[grid].min, GRIDS[grid].max) == (values[0], values[-1])


@pytest.mark.parametrize(("grid", "dtype"), HELD)
def test_values_of_the_grid_stay(grid, dtype):
    values = torch.tensor([*values_of(grid), math.nan], dtype=dtype)
    assert_same(round_to(values, grid), values.double().numpy(), values)


@pytest.mark.parametrize(("grid", "dtype"), HELD)
def test_rounding_finds_the_nearest_value_and_the_even_code_between_two(grid, dtype):
    x = inputs(grid, dtype)
    actual = round_to(x, grid)
    assert actual.dtype == dtype
    assert_same(actual, saturated(x.double().numpy(), nearest(x.double().numpy(), grid), grid), x)


@pytest.mark.parametrize(("grid", "dtype"), [one for one in HELD if one.values[0] in ML_DTYPES])
def test_rounding_is_that_of_ml_dtypes(grid, dtype):
    x = cast_rounds_once(inputs(grid, dtype), grid)
    wide = x.double().numpy()
    positive = np.where(wide > 0, wide, 1.0) if grid == "e8m0" else wide
    expected = positive.astype(ML_DTYPES[grid]).astype(np.float64)
    assert_same(round_to(x, grid), saturated(wide, expected, grid), x)


@pytest.mark.parametrize(("grid", "dtype"), [one for one in HELD if one.values[0] in TORCH_DTYPES])
def test_rounding_is_that_of_torchs_cast(grid, dtype):
    x = cast_rounds_once(inputs(grid, dtype), grid)
    positive = x.abs() if grid == "e8m0" else x  # whose cast drops the sign
    expected = positive.to(TORCH_DTYPES[grid]).double().numpy()
    assert_same(round_to(x, grid), saturated(x.double().numpy(), expected, grid), x)


@pytest.mark.parametrize(("grid", "dtype"), [one for one in HELD if one.values[0] in INTEGERS])
def test_rounding_to_integers_is_rint_within_the_range_and_never_minus_zero(grid, dtype):
    x = inputs(grid, dtype)
    expected = np.clip(np.rint(x.double().numpy()), *INTEGERS[grid]) + 0.0
    assert_same(round_to(x, grid), expected, x)


def test_a_tie_of_e8m0_goes_up():
    ties = torch.tensor([0.75, 1.5, 3.0, 6.0])
    assert round_to(ties, "e8m0").tolist() == [1.0, 2.0, 4.0, 8.0]


def test_e8m0_has_no_zero_and_no_sign():
    x = torch.tensor([0.0, -0.0, 2.0**-149, -1.0, -(2.0**-140)])
    assert_same(round_to(x, "e8m0"), np.array([2.0**-127] * 3 + [math.nan] * 2), x)


@pytest.mark.parametrize(("grid", "dtype"), HELD)
def test_spacing_is_the_way_to_the_next_value_outwards(grid, dtype):
    values = [value for value in values_of(grid) if value >= 0]
    found = spacing(torch.tensor(values, dtype=dtype), grid)
    steps = [high - low for low, high in pairwise(values)]
    assert found.dtype == dtype
    assert found.tolist()[:-1] == steps
    x = torch.linspace(values[0], values[-1], 4097, dtype=torch.float64)
    error = (round_to(x, grid) - x).abs()
    assert (error <= spacing(x, grid) / 2).all()


class _Narrow(TorchDispatchMode):
    """Note operations whose result is floating point below float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64:
                self.found.append(func.name())
        return result


@pytest.mark.parametrize("grid", GRIDS)
def test_float64_is_never_left(grid):
    x = torch.linspace(-9.0, 9.0, 64, dtype=torch.float64)
    with _Narrow() as narrow:
        rounded = round_to(x, grid)
        spacing(x, grid)
        if grid in ML_DTYPES:
            decode(encode(rounded[rounded > 0], grid), grid, torch.float64)
    assert narrow.found == []
    with narrow:
        x.to(torch.float8_e4m3fn)
    assert narrow.found == ["aten::_to_copy"]


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 5)])
@pytest.mark.parametrize("grid", ML_DTYPES)
def test_shapes_stay_and_inputs_are_left_alone(grid, shape):
    x = torch.full(shape, 3.3)
    rounded = round_to(x, grid)
    assert rounded.shape == shape
    assert torch.equal(x, torch.full(shape, 3.3))
    codes = encode(rounded, grid)
    assert codes.shape == shape
    assert torch.equal(decode(codes, grid, torch.float32), rounded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: round_to(x, "fp8"), "grid='fp8', but should be one of float8_e4m3fn, "),
        (lambda x: round_to(x.int(), "int8"), "dtype=torch.int32, but should be a float of 16"),
        (lambda x: round_to(x.half(), "e8m0"), "dtype=torch.float16, but should hold 1.7e"),
        (lambda x: spacing(x.half(), "e8m0"), "use float32"),
        (lambda x: encode(x, "int8"), "grid='int8', but should be of floating point"),
        (lambda x: encode(x / 3, "float4_e2m1"), "value=0.333.*, but should be on the grid"),
        (lambda x: encode(x * 7, "float4_e2m1"), "value=7.0, but should be on the grid"),
        (lambda x: encode(x * math.nan, "float4_e2m1"), "value=nan, but should be on the grid"),
        (lambda x: encode(x * math.inf, "float8_e4m3fn"), "value=inf, but should be on the grid"),
        (lambda x: encode(-x, "e8m0"), "value=-1.0, but should be on the grid"),
        (lambda x: encode(x * 0, "e8m0"), "value=0.0, but should be on the grid"),
        (lambda x: decode(x, "e8m0", x.dtype), "codes.dtype=torch.float32, but should be torch.ui"),
        (lambda x: decode(x.byte() * 16, "float4_e2m1", x.dtype), "code=16, but should be at most"),
        (lambda x: decode(x.byte(), "e8m0", torch.float16), "dtype=torch.float16, but should hold"),
        (lambda x: decode(x.byte(), "int4", x.dtype), "grid='int4', but should be of floating"),
    ],
)
def test_what_a_grid_cannot_do_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3))
