"""What lies halfway between two values of a grid goes the same way whatever summed it."""

from __future__ import annotations

import pytest
import torch

from tpcheck.numerics.grids import GRIDS
from tpcheck.reference.rounding import on_grid


@pytest.mark.parametrize("grid", ["int8", "float8_e4m3fn"])
def test_a_last_bit_does_not_decide_what_half_of_the_largest_becomes(grid: str) -> None:
    largest = torch.tensor(448.0, dtype=torch.float64)
    scale = largest / GRIDS[grid].max
    # e4m3 holds them, and int8's and e4m3's scales put some of them halfway
    held = torch.arange(1, 449, dtype=torch.float64).to(torch.float8_e4m3fn).double()
    for factor in (1.0, 384 / 448, 256 / 448):
        exact = on_grid(held * factor, scale * factor, grid)
        for away in (torch.inf, -torch.inf):
            near = torch.nextafter(held * factor, torch.full_like(held, away))
            assert torch.equal(on_grid(near, scale * factor, grid), exact)


def test_what_is_not_near_to_halfway_is_rounded_as_ever() -> None:
    x = torch.tensor([63.5 - 1e-6, 63.5 + 1e-6], dtype=torch.float64)
    assert on_grid(x, torch.ones(1, dtype=torch.float64), "int8").tolist() == [63.0, 64.0]
