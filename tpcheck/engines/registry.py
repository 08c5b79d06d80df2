"""The engines by the name users ask for, each loaded when it is first asked.

Requirement: a scheduler imports the planner in milliseconds and waits for the one engine it means.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from tpcheck.engines.base import Engine

_MODULES = {
    "reference": "reference",
    "vllm": "vllm",
    "sglang": "sglang",
    "megatron": "megatron",
    "tensorrt-llm": "tensorrt_llm",
    "tgi": "tgi",
    "transformers": "transformers_",
    "pytorch-dtensor": "dtensor",
    "deepspeed": "deepspeed",
    "neuronx-distributed": "neuronx",
    "exllamav2": "exllamav2",
    "exllamav3": "exllamav3",
}
ENGINE_NAMES = tuple(_MODULES)


@cache
def engine_named(name: str) -> Engine:
    """Return an engine with its rules; `name` is one of ENGINE_NAMES."""
    engine: Engine = import_module(f"tpcheck.engines.{_MODULES[name]}").ENGINE
    assert engine.name == name
    return engine
