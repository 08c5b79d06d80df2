"""Rotary position embeddings, half-split as Hugging Face stores them.

Requirement: angles are made in float64 and only then cast: position * frequency in float32 is off
by 1e-4 at a hundred thousand tokens. Tables depend on nothing but their arguments, so ranks of one
process share them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from tpcheck.reference.norm import wide
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
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def inverse_frequencies(spec: ModelSpec) -> torch.Tensor:
    """Return the angle per token of each pair of features: float64 [head_dim / 2].

    Source: RoFormer (Su et al. 2021, section 3.2.2); scaled as transformers 5.23's
    modeling_rope_utils (`linear`, `llama3`).
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    frequencies = spec.rope_theta**-exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend those between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
