"""The rounding that a reduction must cost, injected into a float64 run.

Requirement: a clean layer whose partials cancel drifts far above any fixed limit, so the limit has
to come from this case's own partials. In a float64 run every all-reduce is given, on top of the
exact sum, the rounding noise that the deployed dtype would leave at every node of the reduction
tree; what the output does in response is the drift that this reduction explains. Dilution by the
rest of the model, masks and nonlinearities are then all in, without a formula.

[Injected Noise] One rounding to nearest of x leaves an error of rms 0.424 u |x| (u = eps/2; uniform
error over a binade). TP=1 rounds the sum once; TP=N rounds every partial and every partial sum, so
the extra variance per element is (0.424 u)^2 (sum of squared partials and node sums - sum^2).
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
from tpcheck.numerics.ulp import eps
from tpcheck.trace import Collective

_SUMS = ("all_reduce", "reduce_scatter")


def reduction_noise(dtype: str, kind: str, seed: int, wire: str = "") -> Interceptor:
    """Return an interceptor that adds to each sum over ranks what rounding to `dtype` costs.

    Every rank draws the same noise, because every rank gets the same result of a real reduction.

    Args:
        wire: the dtype that partials are cast to and added in, where it is not `dtype`; the kinds
            of numerics/low_precision.py bring a wire of their own.
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
        if group.size == 1 or call.op not in _SUMS or call.detail in ("max", "min"):
            return result
        partials = list(group._all_gather(x.unsqueeze(0), 0).to(torch.float64).unbind(0))
        steps = sum_steps(partials, carried)
        energy = _extra_energy(partials, steps, deployed, getattr(torch, wire or dtype))
        extra = (energy + float16_energy(partials, carried, deployed)).clamp_min(0).sqrt()
        generator = torch.Generator().manual_seed(seed * 7919 + call.sequence)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * extra.cpu() * unit
        noise += wire_error(partials, carried).cpu()
        if call.op == "reduce_scatter":
            dim = int(call.detail.removeprefix("dim="))
            noise = noise.chunk(group.size, dim)[group.rank]
        return result + (noise / (group.size if call.detail == "avg" else 1)).to(x.device, x.dtype)

    return intercept


def _extra_energy(
    partials: Sequence[torch.Tensor],
    steps: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]],
    deployed: torch.dtype,
    wire: torch.dtype,
) -> torch.Tensor:
    """Return what is rounded at TP=N beyond TP=1's one rounding, as energy in the deployed dtype.

    A number that a dtype holds is not rounded to it, and a sum with nothing is no sum: an embedding
    of which one rank has the row costs nothing. A coarser wire rounds the partials again; a finer
    one leaves the total to be rounded as it is at TP=1.
    """
    finer = (eps(wire) / eps(deployed)) ** 2
    energy = torch.zeros_like(partials[0])
    for term in partials:
        energy += _rounded(term, deployed)
        if finer > 1:
            energy += finer * _rounded(term, wire)
    for operands, node in steps:
        added = torch.stack([operand != 0 for operand in operands]).sum(0) > 1
        energy += finer * torch.where(added, node.square(), 0.0)
    return energy - _rounded(steps[-1][1], deployed) if finer >= 1 else energy


def _rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the square of what `dtype` does not hold, 0 of what it does."""
    return torch.where(x != x.to(dtype).double(), x.square(), 0.0)
