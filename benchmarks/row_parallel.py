"""A bare row-parallel layer: what each rank's product is exactly, and what a rank sends.

Families: independent terms; coherent ones (all positive); cancelling ones (the second half of the
inner dim mirrors the first within 5 %); an outlier channel, 100 times the others, on one rank.

Shape legend: R ranks, T tokens, D hidden, K inner, N = T * D outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = ("independent", "coherent", "cancelling", "outlier")


def layer(
    seed: int,
    tp_size: int,
    family: str = "independent",
    dtype: torch.dtype = torch.bfloat16,
    *,
    tokens: int = 16,
    hidden: int = 64,
    inner: int = 512,
    even: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the ranks' terms [R, N]: exact in float64, and as a kernel accumulates in float32.

    `even` False gives each rank a wider slice of the inner dim than the one before.
    """
    generator = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(tokens, inner, generator=generator)
    w_DK = torch.randn(hidden, inner, generator=generator) / inner**0.5
    if family == "coherent":
        x_TK, w_DK = x_TK.abs(), w_DK.abs()
    if family == "outlier":
        x_TK[:, 3] *= 100
    if family == "cancelling":
        half = inner // 2
        off = 1 + torch.randn(hidden, half, generator=generator) * 0.05
        x_TK[:, half : 2 * half] = x_TK[:, :half]
        w_DK[:, half : 2 * half] = -w_DK[:, :half] * off
    x_TK, w_DK = x_TK.to(dtype), w_DK.to(dtype)
    widths = _widths(inner, tp_size, even)
    pairs = list(zip(x_TK.split(widths, 1), w_DK.split(widths, 1), strict=True))
    exact = torch.stack([(x.double() @ w.double().T).flatten() for x, w in pairs])
    sent = torch.stack([(x.float() @ w.float().T).flatten() for x, w in pairs])
    return exact, sent


def _widths(inner: int, tp_size: int, even: bool) -> list[int]:
    shares = [1 if even else 1 + rank for rank in range(tp_size)]
    ends = [inner * sum(shares[: rank + 1]) // sum(shares) for rank in range(tp_size)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
