"""The hundred real configs: where each is from, and how many were held against a public source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "data" / "model_configs.json"
MODELS: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))
DEFAULTS = [one for one in MODELS if one["source"].startswith("transformers")]
UNCHECKED = {
    *("opt-30b", "StarCoder2-7B", "StarCoder2-15B", "MiniCPM-2B"),
    "InternVL-Chat-V1-5",
}
"""For these no public source was found that says every field."""


def test_every_config_says_where_it_is_from_and_what_it_was_held_against() -> None:
    assert len({one["name"] for one in MODELS}) == 100
    assert all(one["source"] and set(one) - {"checked_in_part"} == KEYS for one in MODELS)
    assert {one["name"] for one in MODELS if not one["checked"]} == UNCHECKED
    assert len(DEFAULTS) == 45


KEYS = {"name", "source", "checked", "config"}


def differing(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that differ, nested ones too."""
    found = {}
    for name, value in config.items():
        other = defaults.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            found |= {f"{name}.{key}": one for key, one in differing(value, other).items()}
        elif value != other and name not in ("architectures", "torch_dtype", "model_type"):
            found[name] = (value, other)
    return found


@pytest.mark.parametrize("one", DEFAULTS, ids=lambda one: one["name"])
def test_a_default_is_what_transformers_says(one: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[one["config"]["model_type"]]()
    defaults = json.loads(made.to_json_string(use_diff=False))
    named = {new: defaults.get(old) for new, old in made.attribute_map.items()}
    assert differing(one["config"], {**named, **defaults}) == {}
