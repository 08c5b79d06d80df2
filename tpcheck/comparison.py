"""compare(actual, expected) -> Comparison: numbers about two tensors, never a judgement.

Requirement: position-exact (a sorted or multiset comparison hides every layout bug), masks of
non-finite values first and apart from every norm, the worst element with both its values, and the
smallest tolerance that would have passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from tpcheck.errors import SubjectError
from tpcheck.numerics.drift import effective_count
from tpcheck.numerics.ulp import in_ulp
from tpcheck.records import Comparison


def compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    dtype: torch.dtype | str | None = None,
) -> Comparison:
    """Compare two tensors element by element in float64.

    Args:
        actual: what was computed.
        expected: what it is held against; same shape.
        rtol: relative part of the tolerance that `mismatches` and `required_atol` refer to.
        atol: absolute part.
        dtype: whose ulp `worst_ulp` is in; by default that of `actual`.

    Raises:
        SubjectError: the shapes differ; the message names both.
    """
    if actual.shape != expected.shape:
        raise SubjectError(
            f"shape={list(actual.shape)}, but should be {list(expected.shape)} as at TP=1"
        )
    got, want = as_float64(actual), as_float64(expected)
    finite = got.isfinite() & want.isfinite()
    count = int(finite.sum())
    error, held, other_masks = (got - want).abs(), want, 0
    if count < finite.numel():  # masks cost more than all the rest, and most tensors need none
        other_masks = int(mask_difference(got, want).sum())
        error, held = torch.where(finite, error, 0.0), torch.where(finite, held, 0.0)
    excess = error - rtol * held.abs() if rtol else error
    rms_error, rms_expected = _rms(error, count), _rms(held, count)
    index = _unravel(int(error.argmax()), error.shape) if error.numel() else ()
    worst = float(error[index]) if error.numel() else 0.0
    return Comparison(
        count=count,
        mismatches=int((excess > atol).sum()) + other_masks,
        mask_mismatches=other_masks,
        rms_error=rms_error,
        rms_expected=rms_expected,
        relative_rms=relative(rms_error, rms_expected),
        worst_error=worst,
        worst_actual=float(got[index]) if error.numel() else 0.0,
        worst_expected=float(want[index]) if error.numel() else 0.0,
        worst_ulp=in_ulp(worst, float(want[index]), dtype or actual.dtype) if count else 0.0,
        index=index,
        required_atol=max(0.0, float(excess.max())) if error.numel() else 0.0,
    )


def relative(error: float, expected: float) -> float:
    """Return error / expected, 0 for no error at all, infinity for an error over nothing."""
    if error == 0:
        return 0.0
    return error / expected if expected else math.inf


def pooled_rms(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float, int]:
    """Return rms(actual - expected), rms(expected) and the count over all pairs together."""
    squares = wanted = 0.0
    count = 0
    for actual, expected in pairs:
        got, want = as_float64(actual), as_float64(expected)
        found, held = float((got - want).square().sum()), float(want.square().sum())
        if math.isfinite(found) and math.isfinite(held):  # as nearly always: no masks
            squares, wanted, count = squares + found, wanted + held, count + want.numel()
            continue
        finite = got.isfinite() & want.isfinite()
        squares += float(torch.where(finite, got - want, 0.0).square().sum())
        wanted += float(torch.where(finite, want, 0.0).square().sum())
        count += int(finite.sum())
    return math.sqrt(squares / max(count, 1)), math.sqrt(wanted / max(count, 1)), count


def error_count(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return how many independent errors actual - expected comes to over all pairs together.

    Source: `effective_count`.
    """
    errors = [(as_float64(a) - as_float64(e)).nan_to_num(0.0, 0.0, 0.0) for a, e in pairs]
    peak = max((float(error.abs().max()) for error in errors if error.numel()), default=0.0) or 1.0
    # In units of the largest: its fourth power may be beyond all floats.
    squares = [(error / peak).square() for error in errors]
    second = sum(float(square.sum()) for square in squares)
    fourth = sum(float(square.square().sum()) for square in squares)
    return effective_count(second, fourth, sum(error.numel() for error in errors))


def sliced_relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the relative rms with every channel, then every token, in units of its own rms.

    One massive channel, or a first token that attracts all attention, otherwise hides what happens
    in the rest. Slices of fewer than 8 elements have no scale of their own and count as 0.
    """
    got, want = as_float64(actual), as_float64(expected)
    if got.shape != want.shape or want.ndim < 2:
        return 0.0, 0.0
    finite = got.isfinite() & want.isfinite()
    error = torch.where(finite, got - want, 0.0).flatten(0, -2).square()
    held = torch.where(finite, want, 0.0).flatten(0, -2).square()
    found = []
    for dim in (0, 1):
        scale = held.mean(dim)
        ratios = (error.mean(dim) / scale)[scale > 0]
        enough = held.shape[dim] >= 8 and ratios.numel() > 0
        found.append(math.sqrt(float(ratios.mean())) if enough else 0.0)
    return found[0], found[1]


def worst_comparison(
    comparisons: Mapping[str, Comparison], limits: Mapping[str, float] | None = None
) -> tuple[str, Comparison]:
    """Return the input whose comparison is furthest off: masks first, then relative rms.

    Args:
        limits: input id -> what its relative rms is measured by; infinite where all is rounding.
    """

    def off(key: str) -> tuple[int, float]:
        limit = 1.0 if limits is None else limits[key]
        found = comparisons[key]
        return found.mask_mismatches, 0.0 if limit == math.inf else found.relative_rms / limit

    worst = max(comparisons, key=off)
    return worst, comparisons[worst]


def describe_region(bad: torch.Tensor) -> str:
    """Return the smallest box round the true elements of a mask: `[0, 5, 32:64]`."""
    if bad.ndim == 0:
        return "[]"
    at = bad.nonzero()
    if len(at) == 0:
        return ""
    parts = []
    for low, high in zip(at.amin(0).tolist(), at.amax(0).tolist(), strict=True):
        parts.append(str(low) if low == high else f"{low}:{high + 1}")
    return f"[{', '.join(parts)}]"


def mask_difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return where one side is NaN, +inf or -inf and the other is not that same thing."""
    return _classes(actual) != _classes(expected)


def scientific(value: float, *, up: bool = False) -> str:
    """Return a positive number as people write tolerances: `3.1e-2`; `up` never rounds below it.

    Example:
        >>> scientific(0.01), scientific(0.03141), scientific(0.03141, up=True)
        ('1e-2', '3.1e-2', '3.2e-2')
    """
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(value))
    mantissa = value / 10.0**exponent
    rounded = math.ceil(mantissa * 10 - 1e-9) / 10 if up else round(mantissa, 1)
    return f"{rounded:g}e{exponent}" if rounded < 10 else f"1e{exponent + 1}"


_LARGEST = tuple(torch.finfo(dtype).max for dtype in (torch.bfloat16, torch.float32, torch.float64))
"""Also where a mask was cast since it was filled in. Not float16's, which a model may reach."""


def as_float64(x: torch.Tensor) -> torch.Tensor:
    """Complex numbers become pairs in a new last dim: casting them would drop a half.

    A dtype's largest number becomes an infinity: it is what models fill masks with
    (`torch.finfo(x.dtype).min`), and as a size it would hide every other logit.
    """
    x = x.detach()
    wide = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).to(torch.float64)
    if not x.is_floating_point() or not wide.numel():
        return wide
    low, high = (abs(float(end)) for end in wide.aminmax())
    largest = {torch.finfo(x.dtype).max, *_LARGEST}
    if max(low, high) < min(largest):  # false for NaN: it hides what else there is
        return wide
    masks = torch.isin(wide.abs(), torch.tensor(sorted(largest), dtype=wide.dtype).to(wide.device))
    return torch.where(masks, wide.sign() * math.inf, wide)


def _classes(x: torch.Tensor) -> torch.Tensor:
    """0 finite, 1 NaN, 2 +inf, 3 -inf: compared by position before anything else."""
    return x.isnan() * 1 + (x == math.inf) * 2 + (x == -math.inf) * 3


def _rms(x: torch.Tensor, count: int) -> float:
    return math.sqrt(float(x.square().sum()) / count) if count else 0.0


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))
