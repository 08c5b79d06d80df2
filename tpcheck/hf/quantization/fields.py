"""One field of a quantization_config: read it as a kind of value, or say what it should be."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from tpcheck.errors import PlanError
from tpcheck.hf.fields import Config
from tpcheck.json_reader import brief

CONFIG = "quantization_config"
STATIC = ": the reference decoder computes the scales of activations as they come"


def refused(name: str, value: object, expected: str, why: str = "") -> PlanError:
    """Return the error that a field should be something else."""
    return PlanError(f"config: {CONFIG}.{name}={brief(value)}, but should be {expected}{why}")


def refuse_unless(fields: Config, name: str, *neutral: object, why: str = "") -> None:
    """Raise where a field is given and is none of these values."""
    value = fields.get(name)
    if value is not None and value not in neutral:
        raise refused(name, value, " or ".join(map(repr, neutral)), why)


def refuse_unknown(fields: Config, known: Collection[str], where: str = "") -> None:
    """Raise where a field that is not known says anything but "no"."""
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", [], {}):
            why = ": the reference decoder does not know it"
            raise refused(f"{where}{name}", value, "absent", why)


def count(name: str, value: Any) -> int:
    """Return a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refused(name, value, "a whole number of at least 1")
    return value


def group_size(fields: Config) -> int:
    """Return how many input features share a scale; -1 says all of them, which is 0 here."""
    value = fields.get("group_size")
    return 0 if value == -1 else count("group_size", value)


def block(name: str, value: Any) -> tuple[int, int]:
    """Return the rows and columns of a block, given as [128, 128] or as 128x128."""
    if isinstance(value, str):
        value = [
            int(size) if re.fullmatch(r"[0-9]{1,9}", size) else size for size in value.split("x")
        ]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise refused(name, value, "two whole numbers of at least 1")
    return count(name, value[0]), count(name, value[1])


def flag(fields: Config, name: str, default: bool) -> bool:
    """Return true or false."""
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise refused(name, value, "true or false")
    return value
