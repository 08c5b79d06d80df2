"""Readers of configs and probes of other machines.

Requirement: a config is planned or refused, and a spec survives its round trip; a probe that was
altered in what it says of a reduction differs from the true one, and is said to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.configs import QWEN_30B, QWEN_72B_INT4
from tests.fuzzing.reader import (
    Reader,
    broken,
    typed,
)
from tests.models import GPT_OSS_CONFIG, MODELS
from tpcheck.errors import TPCheckError


def configs(folder: Path) -> Iterator[Reader]:
    from tpcheck.hf.config import read_config, spec_from_config
    from tpcheck.plan_command import plan_records

    vision = {"hidden_size": 32, "num_heads": 4, "depth": 2, "intermediate_size": 64}
    configs = {
        "llama": MODELS["llama_yarn_mscale"] | {"num_hidden_layers": 2},
        "gpt_oss": GPT_OSS_CONFIG,
        "gpt2": MODELS["gpt2"],
        "moe": QWEN_30B,
        "gptq": QWEN_72B_INT4,
        "vision": {"text_config": MODELS["qwen3"], "vision_config": vision},
    }
    for name, config in configs.items():
        inner = folder / name
        inner.mkdir()
        path = inner / "config.json"

        def judge(data: bytes, inner: Path = inner, path: Path = path, config: Any = config) -> str:
            path.write_bytes(data)
            fields = read_config(inner)
            spec: Any = None
            try:
                spec = spec_from_config(fields)
            except TPCheckError as error:
                refused: TPCheckError | None = error
            else:
                refused = None
                broken(type(spec).from_fields(spec.to_fields()) == spec, "no round trip")
                broken(spec.vocab_size == fields["vocab_size"], "another vocabulary")
            try:
                records = plan_records(str(inner), None, (2, 3))
            except TPCheckError:
                if refused is not None:
                    raise
                return "accepted"
            json.dumps(records, allow_nan=False)
            return "same" if typed(fields) == typed(config) else "accepted"

        yield Reader(f"config.json, {name}", "json", json.dumps(config, indent=1).encode(), judge)


def probes(folder: Path) -> Iterator[Reader]:
    from tpcheck.probes.command import differences, read_other
    from tpcheck.probes.json_form import read_probe
    from tpcheck.probes.json_form import to_json as probe_to_json
    from tpcheck.probes.sweep import probe_reductions

    path = folder / "probe.json"
    report = probe_reductions((3,), backend="sim", sizes=(6, 35), dtypes=("bfloat16",))
    original = json.dumps(probe_to_json(report), indent=1).encode()
    true = _elements(json.loads(original))

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        found = read_probe(path)
        read_other(path, (3,), ("bfloat16",), (6, 35))
        raw = json.loads(data)
        again = probe_to_json(replace(found, environment={"tpcheck": "x", **found.environment}))
        broken(typed(again["messages"]) == typed(_known(raw, again)), "no round trip")
        differs = differences(report, found)
        if not differs["differences"]:
            there = _elements(raw)
            for key in true.keys() & there.keys():
                broken(true[key] == there[key], f"{key} differs, and that is not said")
        return "same" if typed(raw) == typed(json.loads(original)) else "accepted"

    yield Reader("probe report", "json", original, judge)


def _known(raw: Any, written: Any) -> list[Any]:
    """Return the messages of a file without what it may say besides; chunks too."""
    found = []
    for one, known in zip(raw["messages"], written["messages"], strict=True):
        kept = {name: one.get(name) for name in known} | {"bytes": known["bytes"]}
        names = ("start", "stop", "order", "accumulator")
        kept["chunks"] = [{name: chunk.get(name) for name in names} for chunk in one["chunks"]]
        for chunk, other in zip(kept["chunks"], known["chunks"], strict=True):
            if sorted(_ranks(chunk["order"])) == sorted(_ranks(other["order"])):
                chunk["order"] = other["order"]  # addition commutes: its order is made canonical
        found.append(kept)
    return found


def _ranks(order: Any) -> list[int]:
    if not isinstance(order, list):
        return [] if order is None else [order]
    return [rank for child in order for rank in _ranks(child)]


def _elements(raw: Any) -> dict[Any, Any]:
    """Return what is said of each message: its fields; accumulator and order of each element."""
    found = {}
    for one in raw["messages"]:
        chunks = [
            (chunk.get("accumulator"), _unordered(chunk.get("order")))
            for chunk in one["chunks"]
            for _ in range(min(chunk["stop"] - chunk["start"], 1_000))
        ]
        fields = [one.get(name) for name in ("order", "wire", "repeatable", "disagreeing_ranks")]
        found[(one["tp_size"], one["dtype"], one["count"])] = (fields, chunks)
    return found


def _unordered(order: Any) -> Any:
    """Return an order in which a + b is b + a."""
    if not isinstance(order, list):
        return order
    return sorted(map(_unordered, order), key=repr)
