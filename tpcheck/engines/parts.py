"""The parts of a config: the decoder, and the towers beside it.

Requirement: a vision tower whose heads do not divide refuses a degree as a decoder would, so every
nested config is read, each with what it inherits from the whole: how weights are stored, and the
class that loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.engines.facts import Facts
from tpcheck.engines.reading import read_facts
from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

Config = Mapping[str, Any]

_DECODERS = ("text_config", "llm_config", "language_config", "decoder_config")
_TOWERS = ("vision_config", "audio_config", "vision_tower_config", "encoder_config", "vit_config")
_WRAPPERS = ("thinker_config",)
_INHERITED = (
    "quantization_config",
    "compression_config",
    "torch_dtype",
    "dtype",
    "tie_word_embeddings",
)


def read_parts(config: Config) -> tuple[tuple[str, Facts], ...]:
    """Return (name, facts) of each part; a config that is not nested is one part named "".

    Raises:
        PlanError: a field is malformed; names it and its value.
    """
    if not isinstance(config, Mapping):
        raise PlanError(f"config: a {type(config).__name__}, but should be an object of fields")
    nested = {name: _nested(config, name) for name in (*_DECODERS, *_TOWERS, *_WRAPPERS)}
    found = {name: fields for name, fields in nested.items() if fields}
    if not found:
        return (("", read_facts(config)),)
    parts = []
    for name, fields in found.items():
        inherited = {key: config[key] for key in _INHERITED if key in config}
        if name in _WRAPPERS:
            inner = read_parts({**inherited, **fields})
            parts += [(f"{name}.{part}" if part else name, facts) for part, facts in inner]
        elif name in _DECODERS:
            loaded_by = {key: config[key] for key in ("architectures",) if config.get(key)}
            parts.append((name, read_facts({**inherited, **fields, **loaded_by}, where=name)))
        else:
            tower = {key: value for key, value in fields.items() if key not in _NOT_A_TOWERS}
            parts.append((name, read_facts(tower, role="tower", where=name)))
    if not any(facts.role == "text" for _, facts in parts):
        # Qwen2-VL's config.json holds the decoder's fields at the top, beside vision_config
        parts.insert(0, ("", read_facts(config)))
    return tuple(parts)


def part_fields(config: Config, part: str) -> Config:
    """Return a part's own fields with what it inherits; `part` is a name of `read_parts`."""
    for name in filter(None, part.split(".")):
        inherited = {key: config[key] for key in _INHERITED if key in config}
        config = {**inherited, **config[name]}
    return config


_NOT_A_TOWERS = ("vocab_size", "quantization_config")
"""CLIP's class default leaves a vocabulary in vision configs; towers have none to split."""


def _nested(config: Config, name: str) -> Config | None:
    fields = config.get(name)
    if fields is not None and not isinstance(fields, Mapping):
        raise PlanError(f"config: {name}={brief(fields)}, but should be an object of fields")
    return fields
