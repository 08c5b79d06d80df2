"""Rope as a Hugging Face config.json says it: its base, and how its frequencies are stretched.

Requirement: both spellings are read, `rope_theta` with `rope_scaling` and transformers 5's
`rope_parameters`; what is left out is what transformers derives. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tpcheck.errors import PlanError
from tpcheck.hf.fields import Config, get, refuse_unless, required
from tpcheck.json_reader import brief
from tpcheck.spec import RopeScaling


def rope_fields(config: Config) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` from either spelling.

    Raises:
        PlanError: a kind of rope, or a value of it, that the reference decoder cannot do.
    """
    name = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    rope = get(config, name, {})
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise PlanError(f"config: {name}={brief(rope)}, but should be one set of parameters")
    for where in (config, rope):
        refuse_unless(where, "partial_rotary_factor", 1.0)
    theta = rope.get("rope_theta", get(config, "rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_scaling": _scaling(config, name, rope)}


def _scaling(config: Config, name: str, rope: Config) -> RopeScaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "yarn":
        return _yarn(config, name, rope)
    refuse_unless(rope, "attention_factor", 1.0)
    if rope_type == "default":
        return None
    needed = {"linear": ("factor",), "llama3": _LLAMA3_FIELDS}.get(str(rope_type))
    if needed is None:
        raise PlanError(
            f"config: {name}.rope_type={brief(rope_type)},"
            " but should be one of default, linear, llama3, yarn"
        )
    values = {field: required(rope, field, where=f"config: {name}") for field in needed}
    return RopeScaling.from_fields({"rope_type": rope_type, **values})


_LLAMA3_FIELDS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def _yarn(config: Config, name: str, rope: Config) -> RopeScaling:
    """Read yarn's fields; the original length is the present one where neither place gives it."""
    factor = required(rope, "factor", where=f"config: {name}")
    length = get(rope, "original_max_position_embeddings", None)
    length = get(config, "original_max_position_embeddings", length)
    return RopeScaling.from_fields(
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": (
                get(config, "max_position_embeddings", 2048) if length is None else length
            ),
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "truncate": rope.get("truncate", True),
            "attention_factor": get(rope, "attention_factor", _mscale(factor, rope)),
        }
    )


def _mscale(factor: float, rope: Config) -> float:
    """Return the attention factor that DeepSeek's two fields make; 0 derives it from factor."""
    mscales = [get(rope, field, 0) for field in ("mscale", "mscale_all_dim")]
    for field, value in zip(
        ("factor", "mscale", "mscale_all_dim"), (factor, *mscales), strict=True
    ):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise PlanError(f"config: rope: {field}={brief(value)}, but should be a number")
    if not all(mscales) or factor <= 1:
        return 0.0
    above, below = (0.1 * mscale * math.log(factor) + 1.0 for mscale in mscales)
    return float(above / below)
