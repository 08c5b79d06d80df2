"""Read the state-space layers of a config: their heads, groups and width.

Requirement: the fields stand in every family's own spelling, and stay in a config whose layers are
all attention (Granite 4.0's dense models keep mamba_n_heads=128), where they mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.engines.fields import count, number

Config = Mapping[str, Any]
FACTS = ("mamba_num_heads", "mamba_n_groups", "mamba_intermediate_size")
_ALONE = ("mamba", "falcon_mamba", "mamba2")
"""Model types that have no other layers; their config.json has num_heads and intermediate_size of
them."""
_KINDS = ("mamba", "mamba2", "linear_attention", "hybrid", "M")
"""What layer_types, layers_block_type and hybrid_override_pattern call such a layer."""
_FAMILIES = (*_ALONE, "jamba", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2")


def derive_state_space(
    numbers: dict[str, int | None], config: Config, model_type: str | None, where: str
) -> None:
    """Fill in the facts of state-space layers, and clear what a model of them alone has not."""
    if model_type not in _FAMILIES or not _has_such_layers(config):
        numbers.update(dict.fromkeys(FACTS))
        return
    hidden = numbers["hidden_size"]
    times = number(config, ("mamba_expand", "expand"), where)
    width = numbers["mamba_intermediate_size"] or (hidden * times if hidden and times else None)
    if model_type in _ALONE:
        width = numbers["intermediate_size"] or width
        if model_type == "mamba2":
            numbers["mamba_num_heads"] = count(config, "num_heads", where) or None
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"):
            numbers[name] = None
        numbers["intermediate_size"] = None
    heads = numbers["mamba_num_heads"]
    if heads:
        wide = number(config, ("mamba_head_dim",), where)
        width = heads * wide if wide else width
        groups = numbers["mamba_n_groups"] or number(config, ("n_groups",), where)
        numbers["mamba_n_groups"] = groups or 1
    numbers["mamba_intermediate_size"] = width


def _has_such_layers(config: Config) -> bool:
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        kinds = config.get(name)
        if isinstance(kinds, (list, tuple, str)) and kinds:
            return any(kind in kinds for kind in _KINDS)
    return True
