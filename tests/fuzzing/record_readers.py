"""Readers of what tpcheck itself keeps: golden records, and a streamed run's layers.

Requirement: both promise integrity. What was altered is refused by name, unless it says the same
(a manifest's checksum is over values, not over spaces); what is made to fit its own checksums is
held against itself, and crashes nobody.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import golden_records
from tests.fuzzing import mutators
from tests.fuzzing.reader import (
    Judge,
    Reader,
    broken,
    bytes_of,
    typed,
)
from tpcheck.errors import TPCheckError
from tpcheck.json_reader import parse_json


def goldens(folder: Path) -> Iterator[Reader]:
    from tpcheck.golden.listing import listing
    from tpcheck.golden.records import Data, data_file
    from tpcheck.golden.records import from_json as golden_from_json
    from tpcheck.golden.records import to_json as golden_to_json
    from tpcheck.golden.store import read_data, scan
    from tpcheck.golden.tensors import unpack

    golden, data_of_it = golden_records.made(full=True)
    golden_records.kept_in(folder, golden, data_of_it)
    manifest, blob = folder / golden.file, folder / golden.data.file
    original = manifest.read_bytes()

    def state() -> str:
        found = {entry.file: entry for entry in scan(folder)}
        listed = listing(folder, None)
        fine = found[manifest.name].state == "ok"
        broken((listed["outcome"] == "OK") == fine, "the listing says otherwise")
        broken(fine or found[manifest.name].problem, "no problem is named")
        return "ok" if fine else "refused"

    def judge_manifest(data: bytes) -> str:
        blob.write_bytes(data_of_it)
        manifest.write_bytes(data)
        if state() == "refused":
            return "refused"
        broken(typed(json.loads(data)) == typed(json.loads(original)), "an altered manifest is ok")
        return "same"

    yield Reader("golden manifest", "json", original, judge_manifest)

    def judge_data(data: bytes) -> str:
        manifest.write_bytes(original)
        blob.write_bytes(data)
        if state() == "refused":
            return "refused"
        broken(data == data_of_it, "altered data is ok")
        unpack(read_data(folder, golden), golden)
        return "same"

    yield Reader("golden data", "safetensors", data_of_it, judge_data)
    forged_folder = folder / "forged"
    forged_folder.mkdir()

    def judge_forged(data: bytes) -> str:
        """Read a manifest that fits its own checksum, whatever it says."""
        try:
            value = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise TPCheckError(str(error)) from error
        made = golden_from_json(value)
        for old in forged_folder.iterdir():
            old.unlink()
        name = made.file
        if "/" in name or "\0" in name or len(name.encode()) > 200:
            raise TPCheckError("no file has that name")
        (forged_folder / name).write_bytes(data)
        (forged_folder / golden.data.file).write_bytes(data_of_it)
        if data_file(made.stem, made.data.sha256) == made.data.file:
            (forged_folder / made.data.file).write_bytes(data_of_it)
        listing(forged_folder, None)
        unpack(data_of_it, made)
        broken(golden_from_json(golden_to_json(made)) == made, "no round trip")
        return "same" if typed(json.loads(data)) == typed(json.loads(original)) else "accepted"

    def forge(rng: random.Random, data: bytes) -> bytes:
        try:
            value = json.loads(mutators.json_text(mutators.edit_value(rng, json.loads(data))))
            return json.dumps(_fitting(value)).encode()
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return b"{}"

    yield Reader(
        "golden manifest with its checksums made anew", "json", original, judge_forged, forge
    )

    def judge_forged_data(data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        other = Data(data_file(golden.stem, sha256), len(data), sha256)
        unpack(data, replace(golden, data=other))
        return "same" if data == data_of_it else "accepted"

    yield Reader(
        "golden data with its digest made anew", "safetensors", data_of_it, judge_forged_data
    )


def _fitting(value: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest whose key, address, data's name and checksum fit the rest."""
    from tpcheck.golden.records import Key, sha256_of

    key = value["key"]
    key["weights"] = sha256_of({"source": value["weights_are"], "weights": value["weights"]})
    key["config"], key["inputs"] = sha256_of(value["config"]), sha256_of(value["inputs"])
    value["address"] = Key(**key).address
    value.pop("checksum", None)
    return value | {"checksum": sha256_of(value)}


def scratches(folder: Path) -> Iterator[Reader]:
    import torch

    from tpcheck.reference.stream_scratch import MANIFEST, Scratch

    key = {"config": {"hidden_size": 8, "eps": 1e-5}, "files": [["model.safetensors", 123]], "n": 1}
    xs = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    shapes = [tuple(x.shape) for x in xs]
    scratch = Scratch(folder, key)
    scratch.save(3, xs)
    manifest = folder / MANIFEST
    blob = next(folder.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in (manifest, blob)}

    def judge_of(path: Path) -> Judge:
        def judge(data: bytes) -> str:
            for each, content in (whole | {path: data}).items():
                each.write_bytes(content)
            logging.disable(logging.WARNING)
            try:
                done, found = scratch.load(shapes, torch.float32)
            finally:
                logging.disable(logging.NOTSET)
            if not found:
                broken(done == 0, "starts over in the middle")
                return "refused"
            same = all(bytes_of(a) == bytes_of(b) for a, b in zip(found, xs, strict=True))
            broken(done == 3 and same, "an altered run goes on")
            return "same"

        return judge

    yield Reader("manifest of a streamed run", "json", whole[manifest], judge_of(manifest))
    yield Reader("activations of a streamed run", "safetensors", whole[blob], judge_of(blob))
