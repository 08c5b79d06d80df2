"""Read one field of a config: a count, or a word; anything else is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

Config = Mapping[str, Any]


def count(config: Config, name: str, where: str) -> int:
    """Read a number that is 0 where it is not given."""
    return number(config, (name,), where) or 0


def number(config: Config, names: tuple[str, ...], where: str) -> int | None:
    """Read the first of these fields that is given; a list is one number per layer.

    Raises:
        PlanError: not a whole number of at least 1; names the field.
    """
    for name in names:
        value = config.get(name)
        if isinstance(value, (list, tuple)) and value and all(map(_is_count, value)):
            # one per layer: what divides their greatest common divisor divides all of them
            value = math.gcd(*value)
        if value is None:
            continue
        if not _is_count(value):
            if value == 0 and value is not False and name in _MAY_BE_ZERO:
                continue
            raise PlanError(
                f"{where}: {name}={brief(value)}, but should be a whole number of at least 1"
            )
        return int(value)
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_MAY_BE_ZERO = frozenset(
    "first_k_dense_replace moe_layer_start_index n_shared_experts num_shared_experts"
    " moe_num_shared_experts num_shared_expert qk_nope_head_dim qk_rope_head_dim"
    " num_experts num_local_experts n_routed_experts moe_intermediate_size num_key_value_heads"
    " shared_expert_intermediate_size shared_intermediate_size share_expert_dim head_dim n_inner"
    " v_head_dim".split()
)


def word(config: Config, name: str, where: str) -> str | None:
    """Read a text.

    Raises:
        PlanError: something else; names the field.
    """
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise PlanError(f"{where}: {name}={brief(value)}, but should be text")
    return value


def choice(config: Config, name: str, known: tuple[str, ...], default: str, where: str) -> str:
    """Read one of some known words.

    Raises:
        PlanError: another word; names those that are known.
    """
    value = config.get(name)
    if value is None:
        return default
    if value not in known:
        raise PlanError(f"{where}: {name}={brief(value)}, but should be one of {', '.join(known)}")
    return str(value)
