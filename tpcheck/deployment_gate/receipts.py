"""Receipt: what was proven of which bytes, where and until when; a strict file of it. Torch-free.

Requirement: what is signed is understood to the last key. So a receipt has fixed keys, the reader
refuses any other, and its file is read only in the very bytes that the writer makes of it: nothing
in it can be altered, not even a space, without being seen. What is signed is the canonical form,
`canonical_bytes`: JSON with sorted keys, no whitespace, in UTF-8, without the signature, so that
any other tool can check it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.files import read_bounded, write_text
from tpcheck.json_reader import JsonReader, parse_json, refuse
from tpcheck.records import OUTCOMES

SCHEMA = "tpcheck.receipt/1"
MAX_BYTES = 1 << 22
"""A receipt names every file of a model: 4 MiB are some 30,000 shards."""

Json = dict[str, Any]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEYS = (
    "schema subject outcome allowed model tp dtypes backend reduction engine nccl topology tested"
    " environment tpcheck policy_sha256 report_sha256 created expires signature"
).split()


@dataclass(frozen=True, slots=True)
class Signature:
    """An Ed25519 signature: the SHA-256 of the raw public key, and the value, in hexadecimal."""

    key: str
    value: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a deployment was allowed on.

    Args:
        subject: as the report names it.
        outcome: the worst verdict of what the policy asked for.
        allowed: outcomes besides PASS that the policy lets through.
        model: `config_sha256`, `weights_sha256`, `files` (name -> SHA-256).
        tp: every degree that is proven.
        dtypes: every deployed dtype that is.
        backend: what carried the evidence.
        reduction: `kind`, `basis` (emulated, assumed or identified), `identified` (sentences).
        engine: `name`, `version` (None where it has none), `arguments` of its launch.
        nccl: `version` (None without NCCL) and `settings`, its variables in force.
        topology: `class` (simulated, cpu, gpu-loopback, gpus), `gpu`, `gpu_count`, `nodes`.
        tested: rows of `tp_size`, `dtype`, `batch`, `lengths`: the points that ran.
        environment: of the report.
        tpcheck: the version that made the report.
        policy_sha256: what was asked for.
        report_sha256: the report's file.
        created: when the gate allowed it, UTC.
        expires: when it stops to count, UTC.
        signature: None until it is signed.
    """

    subject: str
    outcome: str
    allowed: tuple[str, ...]
    model: Mapping[str, Any]
    tp: tuple[int, ...]
    dtypes: tuple[str, ...]
    backend: str
    reduction: Mapping[str, Any]
    engine: Mapping[str, Any]
    nccl: Mapping[str, Any]
    topology: Mapping[str, Any]
    tested: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    tpcheck: str
    policy_sha256: str
    report_sha256: str
    created: datetime
    expires: datetime
    signature: Signature | None = None


def canonical_bytes(receipt: Receipt) -> bytes:
    """Return what is signed: everything but the signature."""
    value = _to_json(replace(receipt, signature=None))
    del value["signature"]
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def file_bytes(receipt: Receipt) -> bytes:
    """Return the one file that stands for a receipt."""
    text = json.dumps(
        _to_json(receipt), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False
    )
    return f"{text}\n".encode()


def write_receipt(receipt: Receipt, path: str | os.PathLike[str]) -> None:
    """Write a receipt; the file is there whole or not at all.

    Raises:
        TPCheckError: the file cannot be written; names the path.
    """
    write_text(file_bytes(receipt).decode(), path)


def read_receipt(path: str | os.PathLike[str]) -> Receipt:
    """Read a receipt. That it is well-formed says nothing about who wrote it.

    Raises:
        TPCheckError: the file cannot be read, is no receipt, or is not in the form in which
            tpcheck writes them; names the path and the first value that is wrong.
    """
    data = read_bounded(path, MAX_BYTES)
    try:
        return parse_receipt(data)
    except TPCheckError as error:
        raise TPCheckError(f"{path}: is not a tpcheck receipt: {error}") from error


def parse_receipt(data: bytes) -> Receipt:
    """Return the receipt that `file_bytes` made this of. Raises TPCheckError as `read_receipt`."""
    try:
        receipt = _from_json(parse_json(data.decode("utf-8")))
        again = file_bytes(receipt)
    except (ValueError, RecursionError) as error:
        raise TPCheckError(f"not JSON in UTF-8: {error}") from error
    if again != data:
        at = next(
            (i for i, pair in enumerate(zip(again, data, strict=False)) if len({*pair}) > 1), 0
        )
        line = data.count(b"\n", 0, at) + 1
        raise TPCheckError(
            f"line {line} is not as tpcheck writes it; a receipt is used as it was written,"
            " it cannot be edited or formatted"
        )
    return receipt


def parse_time(text: str) -> datetime | None:
    """Return the moment that a text like 2026-01-31T12:00:00Z names; None if it names none."""
    try:
        return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def shown_time(moment: datetime) -> str:
    """Return a moment as people read it, to the second, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _to_json(receipt: Receipt) -> Json:
    signature = receipt.signature
    return {
        "schema": SCHEMA,
        "subject": receipt.subject,
        "outcome": receipt.outcome,
        "allowed": list(receipt.allowed),
        "model": dict(receipt.model),
        "tp": list(receipt.tp),
        "dtypes": list(receipt.dtypes),
        "backend": receipt.backend,
        "reduction": dict(receipt.reduction),
        "engine": dict(receipt.engine),
        "nccl": dict(receipt.nccl),
        "topology": dict(receipt.topology),
        "tested": [dict(row) for row in receipt.tested],
        "environment": dict(receipt.environment),
        "tpcheck": receipt.tpcheck,
        "policy_sha256": receipt.policy_sha256,
        "report_sha256": receipt.report_sha256,
        "created": receipt.created.astimezone(UTC).strftime(_TIME),
        "expires": receipt.expires.astimezone(UTC).strftime(_TIME),
        "signature": signature
        and {"algorithm": "ed25519", "key": signature.key, "value": signature.value},
    }


def _from_json(value: Any) -> Receipt:
    top = JsonReader(value, "receipt")
    if top.get("schema", str) != SCHEMA:
        refuse("receipt.schema", value["schema"], repr(SCHEMA))
    _only(top, *_KEYS)
    created, expires = _time(top, "created"), _time(top, "expires")
    if expires <= created:
        refuse("receipt.expires", value["expires"], f"after {value['created']}, when it was made")
    return Receipt(
        subject=top.get("subject", str),
        outcome=top.choice("outcome", OUTCOMES),
        allowed=_texts(top, "allowed"),
        model=_model(top.reader("model")),
        tp=_degrees(top),
        dtypes=_some(top, "dtypes"),
        backend=top.get("backend", str),
        reduction=_reduction(top.reader("reduction")),
        engine=_engine(top.reader("engine")),
        nccl=_nccl(top.reader("nccl")),
        topology=_topology(top.reader("topology")),
        tested=tuple(_row(row) for row in top.items("tested", dict)),
        environment=top.get("environment", dict),
        tpcheck=top.get("tpcheck", str),
        policy_sha256=_hex(top, "policy_sha256"),
        report_sha256=_hex(top, "report_sha256"),
        created=created,
        expires=expires,
        signature=None if value.get("signature") is None else _signature(top.reader("signature")),
    )


def _only(item: JsonReader, *keys: str) -> None:
    """Refuse keys that are not known: what is signed has to be understood."""
    for key in item.value:
        if key not in keys:
            raise TPCheckError(f"{item.path}.{key[:60]!r} is no key of a {SCHEMA}")


def _time(item: JsonReader, key: str) -> datetime:
    text = item.get(key, str)
    found = parse_time(text)
    if found is None:
        refuse(f"{item.path}.{key}", text, "a time like 2026-01-31T12:00:00Z")
    return found


def _hex(item: JsonReader, key: str, form: re.Pattern[str] = _SHA256) -> str:
    found = item.reader(key, str)
    text: str = found.value
    if not form.fullmatch(text):
        refuse(found.path, text, "lower-case hexadecimal of its full length")
    return text


def _texts(item: JsonReader, key: str) -> tuple[str, ...]:
    return tuple(one.value for one in item.items(key, str))


def _some(item: JsonReader, key: str) -> tuple[str, ...]:
    found = _texts(item, key)
    if not found:
        refuse(f"{item.path}.{key}", [], "a list of at least one")
    return found


def _count(item: JsonReader, key: str) -> int:
    value: int = item.get(key, int)
    if value < 1:
        refuse(f"{item.path}.{key}", value, "at least 1")
    return value


def _degrees(top: JsonReader) -> tuple[int, ...]:
    found = [one.value for one in top.items("tp", int)]
    if not found or min(found) < 1:
        refuse("receipt.tp", found, "a list of at least one degree")
    return tuple(found)


def _model(item: JsonReader) -> Json:
    _only(item, "config_sha256", "weights_sha256", "files")
    files = item.reader("files")
    for name in files.value:
        _hex(files, name)
    return {
        "config_sha256": _hex(item, "config_sha256"),
        "weights_sha256": _hex(item, "weights_sha256"),
        "files": dict(files.value),
    }


def _reduction(item: JsonReader) -> Json:
    _only(item, "kind", "basis", "identified")
    found = list(_texts(item, "identified"))
    return {"kind": item.get("kind", str), "basis": item.get("basis", str), "identified": found}


def _engine(item: JsonReader) -> Json:
    _only(item, "name", "version", "arguments")
    return {
        "name": item.get("name", str),
        "version": item.optional("version", str),
        "arguments": item.get("arguments", dict),
    }


def _nccl(item: JsonReader) -> Json:
    _only(item, "version", "settings")
    settings = item.reader("settings")
    for name in settings.value:
        settings.get(name, str)
    return {"version": item.optional("version", str), "settings": dict(settings.value)}


def _topology(item: JsonReader) -> Json:
    _only(item, "class", "gpu", "gpu_count", "nodes")
    return {
        "class": item.choice("class", ("simulated", "cpu", "gpu-loopback", "gpus")),
        "gpu": item.optional("gpu", str),
        "gpu_count": item.optional("gpu_count", int),
        "nodes": _count(item, "nodes"),
    }


def _row(item: JsonReader) -> Json:
    _only(item, "tp_size", "dtype", "batch", "lengths")
    return {
        "tp_size": _count(item, "tp_size"),
        "dtype": item.get("dtype", str),
        "batch": _count(item, "batch"),
        "lengths": [one.value for one in item.items("lengths", int)],
    }


def _signature(item: JsonReader) -> Signature:
    _only(item, "algorithm", "key", "value")
    item.choice("algorithm", ("ed25519",))
    return Signature(_hex(item, "key"), _hex(item, "value", _SIGNATURE))
