"""Records made by hand and by a tiny subject, for tests of golden."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tpcheck.golden.records import (
    Data,
    Floor,
    Golden,
    Logits,
    data_file,
    identity_of,
    sha256_of,
    to_json,
)
from tpcheck.golden.store import locked, prepare, write
from tpcheck.golden.tensors import pack
from tpcheck.outputs import digest

WEIGHTS = {"embed": "bfloat16 [11, 8] " + "a" * 64, "head": "bfloat16 [11, 8] " + "b" * 64}


def logits(seed: int = 0, shape: tuple[int, ...] = (2, 3, 11)) -> torch.Tensor:
    """Return float64 normals."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(
    *,
    subject: str = "m.py:build",
    case_id: str = "s0-b2-t3",
    full: bool = False,
    weights: Mapping[str, str] = WEIGHTS,
    oracle: torch.Tensor | None = None,
    together: tuple[tuple[str, str], ...] = (),
    **changes: Any,
) -> tuple[Golden, bytes]:
    """Return a record of one input A and its data."""
    oracle = logits() if oracle is None else oracle
    deployed = oracle.bfloat16()
    data = pack({"A": deployed}, {"A": oracle}, case_id=case_id, full=full)
    identity = identity_of(
        source="asked",
        weights=weights,
        config={"hidden_size": 8},
        inputs={"A": "c" * 64},
        dtype="bfloat16",
        tpcheck="0.1.0",
    )
    shape = tuple(oracle.shape)
    one = Logits(shape, "bfloat16", digest(deployed), digest(oracle), "float64", 1.0, 0.4)
    golden = Golden(
        subject=subject,
        case_id=case_id,
        identity=identity,
        logits={"A": one},
        data=Data("", len(data), hashlib.sha256(data).hexdigest()),
        full=full,
        together=together or ((case_id, "bfloat16"),),
        oracle_dtype="float64",
        made_by="TP=1 of the subject",
        floor=Floor(0.0, "float64", "no cast below float64"),
        base_error=None,
        error_count=50.0,
        repeats=True,
        environment={"torch": "2.13.0", "subject": {}},
        command="tpcheck golden record m.py:build golden",
        created="2026-01-31T12:00:00Z",
    )
    golden = replace(golden, **changes)
    return with_data(golden, data), data


def with_data(golden: Golden, data: bytes) -> Golden:
    """Return the record of other data."""
    sha256 = hashlib.sha256(data).hexdigest()
    return replace(golden, data=Data(data_file(golden.stem, sha256), len(data), sha256))


def kept_in(folder: Path, golden: Golden, data: bytes) -> Golden:
    """Write a record as the recorder does and return it."""
    prepare(folder)
    with locked(folder):
        write(folder, golden, data)
    return golden


def forged(golden: Golden, **changes: Any) -> dict[str, Any]:
    """Return a manifest with top-level values replaced and its checksum made to fit."""
    value = to_json(golden) | changes
    value.pop("checksum")
    return value | {"checksum": sha256_of(value)}


def put(folder: Path, name: str, value: Any) -> None:
    """Write a manifest by hand."""
    (folder / name).write_text(json.dumps(value))
