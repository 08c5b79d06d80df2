"""One field of a Hugging Face config.json: required, with a default, or not to be changed.

Requirement: null and absent are the same, as they are to transformers, and a message names the
field and its value. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

Config = Mapping[str, Any]


def required(config: Config, name: str, where: str = "config") -> Any:
    """Return a field that there has to be.

    Raises:
        PlanError: it is absent or null.
    """
    value = config.get(name)
    if value is None:
        raise PlanError(f"{where}: {name} is missing, but should be given")
    return value


def get(config: Config, name: str, default: Any) -> Any:
    """Return a field, or a default where it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def refuse_unless(config: Config, name: str, neutral: Any) -> None:
    """Raise PlanError where a field asks for something that the reference decoder cannot do."""
    value = config.get(name)
    if value is not None and value != neutral:
        raise PlanError(
            f"config: {name}={brief(value)}, but should be {brief(neutral)}:"
            " the reference decoder cannot do otherwise"
        )
