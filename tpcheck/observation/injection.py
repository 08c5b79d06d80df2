"""The rounding that a reduction must cost, injected into a float64 run.

Requirement: a clean layer whose partials cancel drifts far above any fixed limit, so the limit has
to come from this case's own partials. In a float64 run every all-reduce is given, on top of the
exact sum, the rounding noise that the deployed dtype would leave at every node of the reduction
tree; what the output does in response is the drift that this reduction explains. Dilution by the
rest of the model, masks and nonlinearities are then all in, without a formula.

[Injected Noise] TP=1 rounds the sum once; TP=N rounds every partial and every partial sum. What
that leaves beyond TP=1's rounding is added as normal noise of the same mean square, element by
element (numerics/roundoff.py).
A low-precision wire adds the error of its ideal codec (numerics/low_precision.py). What such a wire
loses by saturation is not injected, so it is not explained away.
Source: probabilistic rounding analysis, Higham & Mary 2019; the law held against measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tpcheck.groups.base import Interceptor, RecordedGroup
from tpcheck.numerics.drift import ROUNDING_RMS
from tpcheck.numerics.low_precision import carried_as, float16_energy, wire_error
from tpcheck.numerics.reduction import sum_steps
from tpcheck.numerics.roundoff import (
    finest_grid,
    grid_of,
    node_square,
    rounding_square,
    sum_square,
)
from tpcheck.numerics.ulp import eps
from tpcheck.trace import Collective

_SUMS = ("all_reduce", "reduce_scatter")


def reduction_noise(dtype: str, kind: str, seed: int, wire: str = "") -> Interceptor:
    """Return an interceptor that adds to each sum over ranks what rounding to `dtype` costs.

    Every rank draws the same noise, because every rank gets the same result of a real reduction.

    Args:
        wire: the dtype that partials are cast to and added in, by default `dtype`, or whatever the
            subject itself casts a float64 partial to; the kinds of numerics/low_precision.py bring
            a wire of their own.
    """
    unit = eps(dtype) / 2 * ROUNDING_RMS
    deployed = getattr(torch, dtype)
    carried = carried_as(kind, deployed)

    def intercept(
        group: RecordedGroup,
        call: Collective,
        x: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        result = run(x)
        sums = call.op in _SUMS and call.detail not in ("max", "min")
        if group.size == 1 or not sums or not x.is_floating_point():
            return result
        partials = list(group._all_gather(x.unsqueeze(0), 0).to(torch.float64).unbind(0))
        steps = sum_steps(partials, carried)
        own = deployed if x.dtype == group.dtype else x.dtype  # a cast that stays when deployed
        travels = getattr(torch, wire) if wire else own
        squares = _extra_squares(partials, steps, deployed, travels)
        squares += float16_energy(partials, carried, deployed) * unit**2
        extra = squares.clamp_min(0).sqrt()
        generator = torch.Generator().manual_seed(seed * 7919 + call.sequence)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * extra.cpu()
        noise += wire_error(partials, carried).cpu()
        if call.op == "reduce_scatter":
            noise = noise.chunk(group.size, call.dim)[group.rank]
        return result + (noise / (group.size if call.detail == "avg" else 1)).to(x.device, x.dtype)

    return intercept


def _extra_squares(
    partials: Sequence[torch.Tensor],
    steps: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]],
    deployed: torch.dtype,
    wire: torch.dtype,
) -> torch.Tensor:
    """Return the mean square of what is rounded at TP=N beyond TP=1's one rounding.

    A number that a dtype holds is not rounded to it, and a sum with nothing is no sum: an embedding
    of which one rank has the row costs nothing. A coarser wire rounds the partials again; what a
    finer one brings is rounded to the deployed dtype at last.
    """
    coarser, finer = eps(wire) > eps(deployed), eps(wire) < eps(deployed)
    squares = torch.zeros_like(partials[0])
    for term in partials:
        squares += _rounded(term, deployed)
        if coarser:
            squares += _rounded(term, wire)
    grids: dict[int, torch.Tensor] = {}  # of sums so far, which are operands of the next
    for operands, node in steps:
        own = [grids[id(x)] if id(x) in grids else grid_of(x, wire) for x in operands]
        finest = finest_grid(own)
        squares += sum_square(node, finest, wire)
        grids[id(node)] = torch.maximum(finest, grid_of(node, wire))
    total = steps[-1][1]
    if finer:
        squares += node_square(torch.stack(list(partials)), total, deployed)
    return squares - _rounded(total, deployed)


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean square of what rounding to `dtype` leaves, 0 of what it holds."""
    return torch.where(x != x.to(dtype).double(), rounding_square(x, dtype), 0.0)
