"""Rotary position embeddings, half-split as Hugging Face stores them.

Requirement: angles are made in float64 and only then cast: position * frequency in float32 is off
by 1e-4 at a hundred thousand tokens. Tables depend on nothing but their arguments, so ranks of one
process share them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from tpcheck.reference.rounding import wide
from tpcheck.spec import ModelSpec, RopeScaling


def apply_rope(x_BhTd: torch.Tensor, spec: ModelSpec, start: int) -> torch.Tensor:
    """Rotate each head of x by its token's position, the first token being `start`."""
    x_wide = wide(x_BhTd)
    cos, sin = _tables(spec, start, start + x_BhTd.shape[-2], x_wide.dtype, x_BhTd.device)
    first, second = x_wide.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BhTd.dtype)


@lru_cache(maxsize=4)
def _tables(
    spec: ModelSpec, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, [T, head_dim / 2] each, for positions start to stop."""
    positions = torch.arange(start, stop, dtype=torch.float64)
    angles = positions[:, None] * inverse_frequencies(spec)
    factor = attention_factor(spec.rope_scaling)
    return (angles.cos() * factor).to(device, dtype), (angles.sin() * factor).to(device, dtype)


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the angle per token of each pair of features: float64 [head_dim / 2].

    Source: RoFormer (Su et al. 2021, section 3.2.2); scaled as transformers 5.23's
    modeling_rope_utils (`linear`, `llama3`, `yarn`).
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    frequencies = spec.rope_theta**-exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, scaling, spec.rope_theta)
    return _llama3(frequencies, scaling)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return what cos and sin are multiplied by, so that longer contexts keep their sharpness.

    Source: YaRN (Peng et al. 2023, section 3.4); rotating both q and k applies it twice.
    """
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend those between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(frequencies: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """Keep pairs of more than `beta_fast` turns, stretch those of fewer than `beta_slow`.

    Turns are those within the original length. Between the two places a ramp over the pairs blends;
    `truncate` moves its ends to whole pairs.
    """
    pairs, length = len(frequencies), scaling.original_max_position_embeddings

    def place(turns: float) -> float:
        """Return which pair makes so many turns, as a fraction."""
        return pairs * math.log(length / (2 * math.pi * turns)) / math.log(theta)

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = last - first or 1e-3  # as transformers keeps a ramp of no width from dividing by zero
    stretched = ((torch.arange(pairs, dtype=torch.float64) - first) / width).clamp(0, 1)
    return frequencies * (1 - stretched + stretched / scaling.factor)
