"""The tensors behind `values.fill`: float64, the dim that ranks split being the last.

Requirement: torch is loaded when a tensor is made and not when strategies are, so what needs it
stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

LARGEST = 3e5
"""bfloat16 activations of published models reach 333,824."""

TINIEST = 2e-3
"""Below it the scales of real block quantization saturated."""

_RESIDUE = 2.0**-6
"""What is left of cancelling partials, relative to each of them."""

_OUTLIERS = 16
"""One index in so many is an outlier channel; fewer in a small test would often be none."""

Fill = Callable[[tuple[int, ...], torch.Generator, int], torch.Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _coherent(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    return _by_rank(shape, generator, [1.0] * tp_size)


def _cancelling(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    # equal steps round a circle add up to zero; started at 0.3, no rank's factor is zero
    factors = [math.cos(2 * math.pi * rank / tp_size + 0.3) for rank in range(tp_size)]
    return _by_rank(shape, generator, factors) + _RESIDUE * _normal(shape, generator, tp_size)


def _by_rank(
    shape: tuple[int, ...], generator: torch.Generator, factors: list[float]
) -> torch.Tensor:
    *rest, size = shape
    width = -(-size // len(factors))
    piece = torch.randn((*rest, width), generator=generator, dtype=torch.float64)
    whole = torch.cat([piece * factor for factor in factors], dim=-1)
    return whole[..., :size]


def _massive(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    made = _normal(shape, generator, tp_size)
    size = shape[-1]
    outliers = torch.randperm(size, generator=generator)[: max(1, size // _OUTLIERS)]
    share = 0.5 + 0.5 * torch.rand(
        (*shape[:-1], len(outliers)), generator=generator, dtype=torch.float64
    )
    made[..., outliers] = LARGEST * share * made[..., outliers].sign()
    return made


def _tiny(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    sign = _normal(shape, generator, tp_size).sign()
    # 0.01: no dtype rounds the largest of them up to TINIEST
    power = 0.01 + 14 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return sign * TINIEST * torch.exp2(-power)


def _ties(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    values = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
    return values[torch.randint(3, shape, generator=generator)]


def _integers(shape: tuple[int, ...], generator: torch.Generator, tp_size: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=generator).double()


FILLS: dict[str, Fill] = {
    "normal": _normal,
    "cancelling": _cancelling,
    "coherent": _coherent,
    "massive": _massive,
    "tiny": _tiny,
    "ties": _ties,
    "integers": _integers,
}
