"""Readers of other people's tensors: headers, indexes, captures with their rules, checkpoints.

Requirement: what is accepted is what the format's own library reads, name by name and bit by bit; a
capture that differs in one bit is no PASS; a rule says what its file says.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.fuzzing import mutators
from tests.fuzzing.reader import (
    Reader,
    broken,
    bytes_of,
    tensors_of_all_kinds,
    true_tensors,
)


def headers(folder: Path) -> Iterator[Reader]:
    from safetensors.torch import save

    from tpcheck.header_check.headers import read_header, read_headers, read_metadata

    path = folder / "model.safetensors"
    original = save(tensors_of_all_kinds(), {"order": '["ids"]', "note": "x"})

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        found = read_header(path)
        broken(all(isinstance(one, str) for one in read_metadata(path).values()), "metadata")
        true = true_tensors(data)
        newer = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
        beyond = any(
            0 in one.shape and math.prod(size or 1 for size in one.shape) >= 2**63
            for one in found.values()
        )
        if true is None:  # dtypes that it does not know yet; sizes of nothing that it cannot count
            known = not newer & {one.dtype for one in found.values()} and not beyond
            broken(not known, "the format's own library refuses it")
            return "accepted"
        read = {name: (one.dtype, one.shape) for name, one in found.items()}
        broken(read == {name: one[:2] for name, one in true.items()}, "read otherwise")
        for name, one in found.items():
            stop = one.begin + len(true[name][2])
            broken(data[one.begin : stop] == true[name][2], f"{name}: other bytes")
        return "same" if data == original else "accepted"

    yield Reader("safetensors header", "safetensors", original, judge)
    inner = folder / "sharded"
    inner.mkdir()
    tensors = tensors_of_all_kinds()
    for number, names in enumerate((("layers.0.w", "ids"), ("layers.1.w", "mask"))):
        data = save({name: tensors[name] for name in names})
        (inner / f"model-{number}.safetensors").write_bytes(data)
    files = {"layers.0.w": 0, "ids": 0, "layers.1.w": 1, "mask": 1}
    weight_map = {name: f"model-{number}.safetensors" for name, number in files.items()}
    index = inner / "model.safetensors.index.json"
    text = json.dumps({"metadata": {"total_size": 167}, "weight_map": weight_map}).encode()

    def judge_index(data: bytes) -> str:
        from tpcheck.captures.reading import read_capture
        from tpcheck.reference.tensor_files import Checkpoint

        index.write_bytes(data)
        read_capture(inner)  # what is wrong with an index is a finding there
        found = Checkpoint(inner)
        for name in found.names:
            broken(found.shape(name) == tuple(tensors[name].shape), f"{name}: another shape")
        headers = read_headers(inner)
        broken(set(headers.tensors) >= set(found.names), "an index that names what is not there")
        held = json.loads(data)["weight_map"]
        broken(all(headers.tensors[name].file == file for name, file in held.items()), "elsewhere")
        return "same" if held == weight_map else "accepted"

    yield Reader("safetensors index", "json", text, judge_index)


def captures(folder: Path) -> Iterator[Reader]:
    from safetensors.torch import save

    from tpcheck.captures.comparing import diff

    tensors = tensors_of_all_kinds()
    original = save(tensors, {"order": '["ids", "one"]', "tp_size": "1"})
    (folder / "expected").mkdir()
    (folder / "actual").mkdir()
    (folder / "expected" / "t.safetensors").write_bytes(original)
    path = folder / "actual" / "t.safetensors"
    true = true_tensors(original)

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        report = diff(folder / "expected", folder / "actual")
        if report.outcome != "PASS":
            broken(report.verdicts, "no verdict says why")
            return "refused"
        broken(true_tensors(data) == true, "tensors that differ are PASS")
        return "same"

    yield Reader("capture", "safetensors", original, judge)


def rules(folder: Path) -> Iterator[Reader]:
    import torch

    from tpcheck.captures.comparing import diff
    from tpcheck.captures.order import in_order, read_order
    from tpcheck.captures.shard_map import read_shard_map
    from tpcheck.captures.tolerances import read_tolerances

    w = torch.arange(12.0).reshape(4, 3)
    ranks = [{"w": w[:2], "b": w[0]}, {"w": w[2:], "b": w[0]}]
    shards = {
        "shard": [
            {
                "match": "w",
                "layout": "concat",
                "dim": "out",
                "dims": ["out", "in"],
                "ranks": [0, 1],
            },
            {"match": "q.*", "layout": "concat", "dim": 0, "segments": [4, 2], "copies": [1, 2]},
            {"match": "b", "layout": "replicated"},
            {"match": "s", "layout": "concat", "dim": 1, "sizes": [3, 5], "padding": True},
        ]
    }
    path = folder / "shards.toml"
    original = mutators.toml_text(shards).encode()

    def judge_shards(data: bytes) -> str:
        path.write_bytes(data)
        rules = read_shard_map(path)
        entries = tomllib.loads(data.decode())["shard"]
        for rule, entry in zip(rules, entries, strict=True):
            broken(rule.layout == entry["layout"], "another layout")
            broken(list(rule.ranks) == entry.get("ranks", []), "other ranks")
            broken(rule.padding == entry.get("padding", False), "padding")
        if "(a+)+" not in data.decode():  # a pattern of the user's own that backtracks for ever
            diff({"w": w, "b": w[0]}, ranks, shard_map=path)
        return "same" if entries == shards["shard"] else "accepted"

    yield Reader("shard map", "toml", original, judge_shards)
    limits = {
        "tolerance": [
            {"match": "layers.*", "atol": 1e-2, "rtol": 0.5, "other_dtype": True},
            {"match": "ids", "bits": True},
            {"match": "x", "max_ulp": 2, "relative_rms": 1e-3},
            {"match": ".*", "atol": 0.0},
        ]
    }
    tolerances = folder / "tolerances.toml"

    def judge_tolerances(data: bytes) -> str:
        tolerances.write_bytes(data)
        rules = read_tolerances(tolerances)
        entries = tomllib.loads(data.decode())["tolerance"]
        broken(any(one["match"] == ".*" for one in entries), "no catch-all")
        for rule, entry in zip(rules, entries, strict=True):
            for name in ("atol", "rtol", "max_ulp", "relative_rms"):
                value = getattr(rule.limit, name)
                said = entry.get(name)
                broken(value == (said if said is None else float(said)), f"another {name}")
                broken(value is None or 0 <= value < float("inf"), f"{name} is no limit")
            broken(rule.limit.bits == entry.get("bits", False), "bits")
        return "same" if entries == limits["tolerance"] else "accepted"

    yield Reader("tolerances", "toml", mutators.toml_text(limits).encode(), judge_tolerances)
    lines = folder / "order.txt"
    text = b"# in order\nembed\nlayers\\.\\d+\\.w\nnorm\nlm_head\n"

    def judge_order(data: bytes) -> str:
        lines.write_bytes(data)
        read = read_order(lines)
        broken(all(line.strip() == line and line for line in read), "an empty line")
        names, _ = in_order(["lm_head", "layers.10.w", "layers.2.w", "embed"], read)
        broken(len(names) == 4, "a name was lost")
        return "same" if data == text else "accepted"

    yield Reader("order file", "text", text, judge_order)


def checkpoints(folder: Path) -> Iterator[Reader]:
    from safetensors.torch import save

    from tpcheck.errors import SubjectError
    from tpcheck.reference.tensor_files import Checkpoint

    path = folder / "model.safetensors"
    original = save(tensors_of_all_kinds())

    def judge(data: bytes) -> str:
        path.unlink(missing_ok=True)  # what is mapped stays as it was
        path.write_bytes(data)
        found = Checkpoint(folder)
        true = true_tensors(data)
        broken(true is not None, "the format's own library refuses it")
        assert true is not None
        refused: SubjectError | None = None
        for name in found.names:
            dtype, shape, held = true[name]
            try:
                broken((found.dtype(name), found.shape(name)) == (dtype, shape), "read otherwise")
                parts = [found.whole(name)]
                parts += [found.slice(name, 0, 0, shape[0])] if shape else []
                if len(shape) > 1:
                    found.slice(name, 1, 0, shape[1] // 2)
                if dtype == "BOOL":  # to torch every byte but 0 is the same truth
                    held = bytes(byte != 0 for byte in held)
                for part in parts:
                    broken(bytes_of(part) == held, f"{name}: other bytes")
            except SubjectError as error:
                refused = error
        if refused is not None:
            raise refused
        return "same" if true == true_tensors(original) else "accepted"

    yield Reader("checkpoint", "safetensors", original, judge)
