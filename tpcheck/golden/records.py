"""A golden record's manifest: what it is of, how it was made, and its content address. Torch-free.

Requirement: the address is SHA-256 over what determines TP=1's logits: weights, config, inputs,
dtype and the version of tpcheck. The TP degree is deliberately not in it, because every degree is
held to the same record, and neither are time, machine and command, which may differ between two
records of the same thing. A manifest that was edited, cut off or renamed is refused by name: its
checksum covers all of it, its address its own key, its file name what it says of itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.json_reader import JsonReader, refuse

SCHEMA = "tpcheck.golden/2"

Json = dict[str, Any]
Named = tuple[str, str]
"""A case's id and a deployed dtype: what a record is of, for a reader."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHORT = 12
_MAX_VALUES = 2**48

LOGIT_DTYPES = (
    *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
)
"""What a subject may return: all that safetensors can hold, complex numbers as pairs."""


@dataclass(frozen=True, slots=True)
class Key:
    """What determines TP=1's logits. `weights`, `config` and `inputs` are SHA-256 in hex."""

    weights: str
    config: str
    inputs: str
    dtype: str
    tpcheck: str

    @property
    def address(self) -> str:
        """Return the content address: SHA-256 over the five fields."""
        return sha256_of({"schema": SCHEMA, **self.to_json()})

    def to_json(self) -> Json:
        """Return the fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a subject is: a key, and what stands behind its digests, to say what changed.

    weights: name -> `bfloat16 [96, 64] <SHA-256>` of each tensor, or of each file of a directory;
    config: the spec's fields, or the digests of a directory's config files; inputs: id -> SHA-256.
    source: where the weights' digest is from: asked, parameters, directory or none.
    """

    key: Key
    source: str
    weights: Mapping[str, str]
    config: Mapping[str, Any]
    inputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Logits:
    """One input's logits at TP=1: shape and dtype deployed, digests of all their bits, sizes.

    `oracle` is the digest of the oracle's bits and `oracle_dtype` what those are in (a subject may
    end with a cast), both empty where there is none. `rms` is that of the
    oracle (of the deployed logits, where there is none) and `epsilons` how far the deployed ones
    are from it, in eps of the deployed dtype times `rms`; None where nothing is finite.
    """

    shape: tuple[int, ...]
    dtype: str
    deployed: str
    oracle: str
    oracle_dtype: str
    rms: float | None
    epsilons: float | None


@dataclass(frozen=True, slots=True)
class Floor:
    """What casts narrower than the oracle's dtype may move: see evidence.NoiseFloor."""

    relative_rms: float
    tier: str
    source: str


@dataclass(frozen=True, slots=True)
class Data:
    """The safetensors file beside a manifest."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Golden:
    """A manifest. `together` names every record that the same command was to write.

    oracle_dtype: empty where the subject has no wider run. base_error: TP=1's own error where there
    is no oracle. error_count: independent errors behind it. repeats: whether TP=1 gave the same
    bits twice; else they are not compared.
    """

    subject: str
    case_id: str
    identity: Identity
    logits: Mapping[str, Logits]
    data: Data
    full: bool
    together: tuple[Named, ...]
    oracle_dtype: str
    made_by: str
    floor: Floor
    base_error: float | None
    error_count: float
    repeats: bool
    environment: Mapping[str, Any]
    command: str
    created: str

    @property
    def address(self) -> str:
        return self.identity.key.address

    @property
    def named(self) -> Named:
        """Return the case and dtype."""
        return (self.case_id, self.identity.key.dtype)

    @property
    def stem(self) -> str:
        """Return the file name without its end: readable, then the short address."""
        dtype = self.identity.key.dtype
        return f"{slug(self.subject)}.{case_slug(self.case_id)}.{dtype}.{self.address[:_SHORT]}"

    @property
    def file(self) -> str:
        """Return the manifest's file name."""
        return f"{self.stem}.json"


def data_file(stem: str, sha256: str) -> str:
    """Return the name of a record's data: a rewritten record never overwrites the old one's."""
    return f"{stem}.{sha256[:_SHORT]}.safetensors"


def slug(subject: str) -> str:
    """Return a subject's name as a file name can hold it.

    Example:
        >>> slug("builtin:llama-tiny+double_bias"), slug("models.py:build")
        ('builtin-llama-tiny-double_bias', 'models-py-build')
    """
    return re.sub(r"[^A-Za-z0-9_]+", "-", subject).strip("-")[-60:] or "subject"


def case_slug(case_id: str) -> str:
    """Return a case's id as a file name can hold it; a spec becomes its digest.

    Example:
        >>> case_slug("s0-b2-t16")
        's0-b2-t16'
    """
    plain, plus, spec = case_id.partition("+")
    return f"{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}" if plus else plain


def canonical(value: Any) -> bytes:
    """Return JSON that is the same for equal values, whatever order their keys were set in."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def to_json(golden: Golden) -> Json:
    """Return a manifest as JSON values, with the checksum over all of them."""
    identity, floor, data = golden.identity, golden.floor, golden.data
    value: Json = {
        "schema": SCHEMA,
        "address": golden.address,
        "key": identity.key.to_json(),
        "subject": golden.subject,
        "case": golden.case_id,
        "together": [list(one) for one in golden.together],
        "full": golden.full,
        "data": {"file": data.file, "bytes": data.bytes, "sha256": data.sha256},
        "logits": {
            name: {field: getattr(one, field) for field in Logits.__slots__}
            | {"shape": list(one.shape)}
            for name, one in golden.logits.items()
        },
        "oracle_dtype": golden.oracle_dtype,
        "made_by": golden.made_by,
        "floor": {name: getattr(floor, name) for name in Floor.__slots__},
        "base_error": golden.base_error,
        "error_count": golden.error_count,
        "repeats": golden.repeats,
        "weights_are": identity.source,
        "weights": dict(identity.weights),
        "config": dict(identity.config),
        "inputs": dict(identity.inputs),
        "environment": dict(golden.environment),
        "command": golden.command,
        "created": golden.created,
    }
    value = json.loads(canonical(value))  # what a reader gets: tuples are lists
    return value | {"checksum": sha256_of(value)}


def from_json(value: Any) -> Golden:
    """Return the record that a manifest describes.

    Raises:
        TPCheckError: another schema, something missing or of another type, or the manifest does
            not fit its own checksum and address; names the path of the value.
    """
    top = JsonReader(value, "golden")
    schema = top.get("schema", str)
    if schema != SCHEMA:
        refuse("golden.schema", schema, f"{SCHEMA!r}: it was written by another tpcheck")
    checksum = sha256_of({name: one for name, one in value.items() if name != "checksum"})
    if top.get("checksum", str) != checksum:
        raise TPCheckError("golden.checksum is not that of the rest: the record was edited")
    golden = _golden(top)
    if top.get("address", str) != golden.address:
        refuse("golden.address", value["address"], f"{golden.address}, that of its key")
    parts = {
        "weights": weights_digest(golden.identity),
        "config": config_digest(golden.identity),
        "inputs": sha256_of(dict(golden.identity.inputs)),
    }
    for name, digest in parts.items():
        if getattr(golden.identity.key, name) != digest:
            refuse(f"golden.key.{name}", value["key"][name], f"{digest}, that of golden.{name}")
    return golden


def weights_digest(identity: Identity) -> str:
    """Return the digest of an identity's weights."""
    return sha256_of({"source": identity.source, "weights": dict(identity.weights)})


def config_digest(identity: Identity) -> str:
    """Return the digest of an identity's config."""
    return sha256_of(json.loads(canonical(dict(identity.config))))


def identity_of(
    *,
    source: str,
    weights: Mapping[str, str],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    dtype: str,
    tpcheck: str,
) -> Identity:
    """Return an identity with the key that its parts come to."""
    empty = Key("", "", "", dtype, tpcheck)
    parts = Identity(empty, source, weights, config, inputs)
    digests = weights_digest(parts), config_digest(parts), sha256_of(dict(inputs))
    return Identity(Key(*digests, dtype, tpcheck), source, weights, config, inputs)


def _golden(top: JsonReader) -> Golden:
    floor = top.reader("floor")
    return Golden(
        subject=top.get("subject", str),
        case_id=top.get("case", str),
        identity=Identity(
            key=_key(top.reader("key")),
            source=top.choice("weights_are", ("asked", "parameters", "directory", "none")),
            weights=_texts(top.reader("weights")),
            config=top.get("config", dict),
            inputs=_texts(top.reader("inputs")),
        ),
        logits=_logits_by_input(top),
        data=_data(top.reader("data")),
        full=top.get("full", bool),
        together=tuple(_pair(item) for item in top.items("together", list)),
        oracle_dtype=top.choice("oracle_dtype", ("", "float32", "float64")),
        made_by=top.get("made_by", str),
        floor=Floor(_size(floor, "relative_rms"), floor.get("tier", str), floor.get("source", str)),
        base_error=None if top.value.get("base_error") is None else _size(top, "base_error"),
        error_count=_size(top, "error_count"),
        repeats=top.get("repeats", bool),
        environment=top.get("environment", dict),
        command=top.get("command", str),
        created=top.get("created", str),
    )


def _key(item: JsonReader) -> Key:
    for name in ("weights", "config", "inputs"):
        _require_sha256(item, name)
    return Key(**{name: item.get(name, str) for name in Key.__slots__})


def _data(item: JsonReader) -> Data:
    size = item.get("bytes", int)
    if size < 0:
        refuse(f"{item.path}.bytes", size, "at least 0")
    name = item.get("file", str)
    if "/" in name or name.startswith("."):  # never anything outside the folder
        refuse(f"{item.path}.file", name, "the name of a file beside the manifest")
    return Data(name, size, _require_sha256(item, "sha256"))


def _logits_by_input(top: JsonReader) -> dict[str, Logits]:
    found = top.reader("logits")
    if not found.value:
        refuse("golden.logits", {}, "those of at least one input")
    return {name: _logits(found.reader(name)) for name in found.value}


def _logits(item: JsonReader) -> Logits:
    shape = tuple(one.value for one in item.items("shape", int))
    if any(size < 0 for size in shape) or len(shape) > 16 or math.prod(shape) > _MAX_VALUES:
        refuse(f"{item.path}.shape", list(shape), "sizes of a tensor")
    return Logits(
        shape=shape,
        dtype=item.choice("dtype", LOGIT_DTYPES),
        deployed=item.get("deployed", str),
        oracle=item.get("oracle", str),
        oracle_dtype=item.choice("oracle_dtype", ("", *LOGIT_DTYPES)),
        rms=item.optional("rms", (int, float)),
        epsilons=item.optional("epsilons", (int, float)),
    )


def _texts(item: JsonReader) -> dict[str, str]:
    return {name: item.get(name, str) for name in item.value}


def _pair(item: JsonReader) -> Named:
    if len(item.value) != 2 or not all(isinstance(one, str) for one in item.value):
        refuse(item.path, item.value, "a case's id and a dtype")
    return (item.value[0], item.value[1])


def _size(item: JsonReader, name: str) -> float:
    value = float(item.get(name, (int, float)))
    if value < 0:
        refuse(f"{item.path}.{name}", value, "at least 0")
    return value


def _require_sha256(item: JsonReader, name: str) -> str:
    value: str = item.get(name, str)
    if not _SHA256.fullmatch(value):
        refuse(f"{item.path}.{name}", value, "a SHA-256 in hex")
    return value
