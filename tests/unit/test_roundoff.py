"""Mean squares of roundings, against roundings that were made."""

from __future__ import annotations

import pytest
import torch

from tpcheck.numerics.roundoff import (
    finest_grid,
    grid_of,
    node_square,
    rounding_square,
    sum_square,
)

torch.set_num_threads(1)
COUNT = 40_000
DTYPES = [torch.bfloat16, torch.float16]


def normal(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.7, 1e-6])
def test_one_rounding_leaves_what_is_said(dtype: torch.dtype, scale: float) -> None:
    """1e-6 is subnormal in float16: its steps are all alike there."""
    x = normal(0) * scale
    made = (rounded(x, dtype) - x).square().mean()
    assert float(made / rounding_square(x, dtype).mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("apart", [0.25, 1.0, 4.0, 64.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_of_numbers_of_the_dtype_leaves_what_is_said(
    dtype: torch.dtype, apart: float, sign: int
) -> None:
    a, b = rounded(normal(1).abs() + 1, dtype), rounded((normal(2).abs() + 1) * apart, dtype) * sign
    made = (rounded(a + b, dtype) - (a + b)).square().mean()
    expected = node_square(torch.stack([a, b]), a + b, dtype).mean()
    assert float(made / expected) == pytest.approx(1, abs=0.05)


def test_two_numbers_of_one_binade_leave_nothing_or_half_a_step() -> None:
    a, b = torch.tensor([1.0078125, 1.0]).double(), torch.tensor([1.0, 1.0]).double()
    step = 2 * torch.finfo(torch.bfloat16).eps
    expected = node_square(torch.stack([a, b]), a + b, torch.bfloat16)
    assert expected.tolist() == [step**2 / 8] * 2


def test_a_sum_with_nothing_and_one_that_cancels_leave_nothing() -> None:
    x, nothing = rounded(normal(3), torch.bfloat16), torch.zeros(COUNT, dtype=torch.float64)
    assert not node_square(torch.stack([x, nothing]), x, torch.bfloat16).any()
    assert not node_square(torch.stack([x, -x]), nothing, torch.bfloat16).any()


def test_a_sum_that_nearly_cancelled_keeps_its_operands_grid() -> None:
    """Its size says fine steps; adding to it rounds as numbers of its operands' size do."""
    a = rounded(normal(4).abs() + 1, torch.bfloat16)
    b = -rounded(a + 0.05 * normal(5), torch.bfloat16)
    c = rounded(normal(6).abs() + 1, torch.bfloat16)
    difference = rounded(a + b, torch.bfloat16)
    made = (rounded(difference + c, torch.bfloat16) - (difference + c)).square().mean()
    grids = [grid_of(x, torch.bfloat16) for x in (a, b, c)]
    kept = torch.maximum(finest_grid(grids[:2]), grid_of(difference, torch.bfloat16))
    known = sum_square(difference + c, finest_grid([kept, grids[2]]), torch.bfloat16)
    blind = node_square(torch.stack([difference, c]), difference + c, torch.bfloat16)
    assert float(made / known.mean()) == pytest.approx(1, abs=0.1)
    assert float(made / blind.mean()) < 0.9
