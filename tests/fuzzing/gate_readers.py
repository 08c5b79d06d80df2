"""Readers of what a deployment is gated by: reports, policies, receipts, keys, digests of a model.

Requirement: a report or policy is accepted as exactly what stands there, survives its own round
trip, and a gate's ALLOWED is one that laws.unproven finds proven too; a receipt is accepted in the
bytes that were signed, and a model's digest is that of its bytes.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import gate_reports, receipting
from tests.fuzzing import mutators
from tests.fuzzing.laws import unproven
from tests.fuzzing.reader import (
    Reader,
    Violation,
    broken,
    typed,
)
from tpcheck import model_digest
from tpcheck.deployment_gate.decision import decide
from tpcheck.deployment_gate.gating import decision_json
from tpcheck.deployment_gate.policy import parse_policy, policy_json, read_policy
from tpcheck.deployment_gate.receipts import parse_receipt, read_receipt
from tpcheck.deployment_gate.requiring import _require
from tpcheck.deployment_gate.signing import (
    assert_signed,
    assert_usable,
    fingerprint,
    new_key,
    read_public_key,
    sign,
)
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.json_reader import parse_json
from tpcheck.render.gate import render_gate, render_gate_junit, render_gate_markdown
from tpcheck.report import from_json, read_report, to_json, write_report

NOW = gate_reports.NOW


def reports(folder: Path) -> Iterator[Reader]:
    path = folder / "report.json"
    policy = parse_policy(gate_reports.POLICY)
    write_report(from_json(gate_reports.report_json()), path)
    original = path.read_bytes()

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        report = read_report(path)
        raw = json.loads(data)
        written = to_json(report)
        broken(from_json(parse_json(json.dumps(written))) == report, "no round trip")
        for name, value in _what_counts(raw).items():
            broken(typed(_what_counts(written)[name]) == typed(value), f"{name} was not kept")
        decision = decide(report, policy, NOW)
        if decision.allowed:
            lack = unproven(raw, policy, NOW)
            broken(not lack, f"allowed, but {lack}")
        _shown(decision, policy, report)
        return "same" if typed(raw) == typed(json.loads(original)) else "accepted"

    yield Reader("report", "json", original, judge)


def _what_counts(raw: Any) -> dict[str, Any]:
    """Return what verdicts and gates are made of, in the spelling of the file."""
    found = {name: raw.get(name) for name in ("outcome", "subject", "environment", "path")}
    found |= {name: raw.get(name) for name in ("tpcheck", "sensitivity", "drift", "engine")}
    found |= {name: raw.get(name) for name in ("model", "tested", "reduction")}
    found["path"] = {
        name: raw["path"][name]
        for name in ("backend", "collectives", "same_as_deployed", "differences")
    }
    for i, one in enumerate(raw["verdicts"]):
        for name in ("case_id", "tp_size", "dtype", "outcome"):
            found[f"verdicts[{i}].{name}"] = one[name]
        for name, check in one["checks"].items():
            found[f"verdicts[{i}].{name}"] = {
                key: value for key, value in check.items() if (key, value) != ("reason", "")
            }
    found["verdicts"] = len(raw["verdicts"])
    return found


def policies(folder: Path) -> Iterator[Reader]:
    path = folder / "policy.toml"
    original = mutators.toml_text({"policy": gate_reports.POLICY}).encode()
    raw_report = gate_reports.report_json()
    report = from_json(raw_report)

    def judge(data: bytes) -> str:
        path.write_bytes(data)
        policy = read_policy(path)
        asked = tomllib.loads(data.decode())["policy"]
        values = {name: one for name, one in policy_json(policy).items() if one is not None}
        broken(parse_policy(values) == policy, "no round trip")
        for name, value in asked.items():
            if name == "match":
                value = dict(_flat(value))
            broken(_plain(values[name]) == _plain(value), f"policy.{name} was not kept")
        decision = decide(report, policy, NOW)
        if decision.allowed:
            lack = unproven(raw_report, policy, NOW)
            broken(not lack, f"allowed, but {lack}")
        _shown(decision, policy, report)
        return "same" if _plain(asked) == _plain(gate_reports.POLICY) else "accepted"

    yield Reader("policy", "toml", original, judge)


def _flat(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _flat(item, f"{path}{key}.")
        else:
            yield f"{path}{key}", item


def _plain(value: Any) -> str:
    """Return one text for equal values, where a limit of 3 is one of 3.0."""
    return json.dumps(value, sort_keys=True).replace(".0,", ",").removesuffix(".0")


def _shown(decision: Any, policy: Any, report: Any) -> None:
    found = decision_json(decision, policy, report)
    json.dumps(found, allow_nan=False)
    for render in (render_gate, render_gate_markdown, render_gate_junit):
        render(found)


def receipts(folder: Path) -> Iterator[Reader]:
    there = receipting.Deployment(folder)
    original = there.path.read_bytes()
    here = receipting.make_here()
    other_key = folder / "other"
    new_key(other_key)

    def starts(path: Path) -> Any:
        try:
            return _require(
                *(path, there.model, 2, there.public, None, False), here=here, now=receipting.NOW
            )
        except GateRefused as refused:
            bugs = [one.reason for one in refused.refusals if "cannot be checked" in one.reason]
            broken(not bugs, f"a bug of ours: {bugs[:1]}")
            raise

    def judge(data: bytes) -> str:
        there.path.write_bytes(data)
        try:
            receipt = read_receipt(there.path)
            assert_signed(receipt, there.public)
        except TPCheckError:
            try:
                starts(there.path)
            except GateRefused:
                raise
            raise Violation("a server starts by a receipt that is refused") from None
        broken(data == original, "an altered receipt was accepted")
        starts(there.path)
        return "same"

    def forge(rng: random.Random, data: bytes) -> bytes:
        """Edit, write it as tpcheck does, and sign it with another key."""
        if rng.random() < 0.3:  # a second signature of the same key and content, as by s + L
            return _malleable(data)
        return _signed(_rendered(rng, data), other_key)

    yield Reader("receipt", "json", original, judge, forge)

    def judge_signed(data: bytes) -> str:
        """Hold the reader against what the owner of the key signed: odd, but honest."""
        there.path.write_bytes(data)
        receipt = starts(there.path)
        digest = model_digest.digest_directory(there.model)
        broken(receipt.model["weights_sha256"] == digest.weights_sha256, "other weights")
        broken(receipt.model["config_sha256"] == digest.config_sha256, "another config")
        broken(2 in receipt.tp, "another degree")
        broken(receipt.created <= receipting.NOW + receipting.timedelta(minutes=5), "not yet made")
        broken(receipting.NOW < receipt.expires, "expired")
        broken(receipt.outcome in ("PASS", *receipt.allowed), "another outcome")
        broken(receipt.outcome not in ("WRONG", "ERROR", "INCONCLUSIVE"), "never let through")
        return "same" if data == original else "accepted"

    def sign_again(rng: random.Random, data: bytes) -> bytes:
        return _signed(_rendered(rng, data), there.key)

    yield Reader("receipt, signed again by its owner", "json", original, judge_signed, sign_again)
    yield from _keys(folder, there)


def _rendered(rng: random.Random, data: bytes) -> bytes:
    text = mutators.json_text(mutators.edit_value(rng, json.loads(data)))
    try:
        return receipting.rendered(json.loads(text))
    except (ValueError, RecursionError):  # no encoder writes that
        return text.encode(errors="surrogatepass")


def _signed(data: bytes, key: Path) -> bytes:
    try:
        value = json.loads(data)
        signed = sign(replace(parse_receipt(data), signature=None), key).signature
        assert signed is not None
        value["signature"] = {"algorithm": "ed25519", "key": signed.key, "value": signed.value}
        return receipting.rendered(value)
    except (TPCheckError, ValueError, RecursionError, TypeError):
        return data


def _malleable(data: bytes) -> bytes:
    """Add the order of the group to the signature's scalar: sloppy verifiers take that too."""
    value = json.loads(data)
    raw = bytes.fromhex(value["signature"]["value"])
    scalar = int.from_bytes(raw[32:], "little") + 2**252 + 27742317777372353535851937790883648493
    value["signature"]["value"] = (raw[:32] + scalar.to_bytes(32, "little")).hex()
    return receipting.rendered(value)


def _keys(folder: Path, there: receipting.Deployment) -> Iterator[Reader]:
    receipt = there.receipt
    public = there.public.read_bytes()
    own = fingerprint(read_public_key(there.public))
    other = folder / "fuzzed.pub"

    def judge_public(data: bytes) -> str:
        other.write_bytes(data)
        if fingerprint(read_public_key(other)) == own:
            return "same"
        try:
            assert_signed(receipt, other)
        except TPCheckError:
            return "accepted"
        raise Violation("another key verifies the signature")

    yield Reader("public key", "pem", public, judge_public)
    secret = folder / "fuzzed.key"
    secret.touch(0o600)
    lines = there.key.read_text().split("\n")

    def judge_private(data: bytes) -> str:
        secret.write_bytes(data)
        try:
            assert_usable(secret)
        except TPCheckError as error:
            broken(lines[1][10:30] not in str(error), "the key stands in a message")
            raise
        again = sign(replace(receipt, signature=None), secret).signature
        return "same" if again is not None and again.key == own else "accepted"

    yield Reader("private key", "pem", there.key.read_bytes(), judge_private)


def digests(folder: Path) -> Iterator[Reader]:
    model = receipting.make_model(folder / "model")
    path = folder / "digests.json"
    true = model_digest.digest_directory(model, paranoid=True, cache=path)
    sha256 = {one.name: one.sha256 for one in true.files}
    stamps = {name: model_digest._stamp(model / name) for name in sha256}
    kept = {stamps[name]: sha256[name] for name in sha256 if name.endswith(".safetensors")}
    path.unlink(missing_ok=True)
    model_digest._keep(path, kept)

    def judge_cache(data: bytes) -> str:
        path.write_bytes(data)
        path.chmod(0o600)
        found = model_digest.digest_directory(model, cache=path)
        if found == true:
            return "same"
        said = {tuple(row[:6]): row[6] for row in json.loads(data)["files"]}
        for one in found.files:
            if one.sha256 != sha256[one.name]:  # who can write the cache: see SECURITY.md
                broken(said.get(stamps[one.name]) == one.sha256, "a digest out of nowhere")
        broken(model_digest.digest_directory(model, paranoid=True, cache=path) == true, "paranoid")
        return "accepted"

    yield Reader("digest cache", "json", path.read_bytes(), judge_cache)
    index = model / "model.safetensors.index.json"
    original = index.read_bytes()

    def judge_index(data: bytes) -> str:
        index.write_bytes(data)
        found = model_digest.digest_directory(model, cache=path)
        if data == original:
            return "same"
        broken(found.weights_sha256 != true.weights_sha256, "another index, the same digest")
        return "accepted"

    yield Reader("digested index", "json", original, judge_index)
