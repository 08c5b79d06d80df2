"""A receipt is read in the very bytes that were written, or not at all.

Evidence: every key removed, added and of another type; every byte flipped; generated values.
"""

import copy
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.receipting import (
    NOW,
    POLICY,
    altered,
    leaves,
    make_model,
    make_receipt_of,
    make_report,
    rendered,
)
from tpcheck.deployment_gate.decision import decide
from tpcheck.deployment_gate.issuing import DEFAULT_DAYS, make_receipt
from tpcheck.deployment_gate.policy import Policy
from tpcheck.deployment_gate.receipts import (
    Receipt,
    canonical_bytes,
    file_bytes,
    parse_receipt,
    read_receipt,
    write_receipt,
)
from tpcheck.errors import TPCheckError
from tpcheck.records import Check, Report, Verdict
from tpcheck.records import Path as RunPath


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("receipts") / "model")


@pytest.fixture(scope="module")
def receipt(model: Path) -> Receipt:
    return make_receipt_of(make_report(model))


def test_what_is_written_is_read_again(receipt: Receipt, tmp_path: Path) -> None:
    write_receipt(receipt, tmp_path / "r.json")
    assert read_receipt(tmp_path / "r.json") == receipt
    assert (tmp_path / "r.json").read_bytes() == file_bytes(receipt)


def test_it_holds_everything_that_was_asked_for(receipt: Receipt, model: Path) -> None:
    value = json.loads(file_bytes(receipt))
    report = make_report(model)
    assert report.model is not None
    assert value["model"]["weights_sha256"] == report.model["weights_sha256"]
    assert value["model"]["config_sha256"] == report.model["config_sha256"]
    assert (value["tp"], value["dtypes"], value["backend"]) == ([2, 4], ["bfloat16"], "nccl")
    assert value["reduction"] == {"kind": "ring", "basis": "assumed", "identified": []}
    assert value["engine"] == report.engine
    assert value["nccl"] == {"version": "2.28.9", "settings": {"NCCL_ALGO": "Ring"}}
    topology = {"class": "gpus", "gpu": "NVIDIA H200", "gpu_count": 8, "nodes": 1}
    assert value["topology"] == topology
    assert [row["lengths"] for row in value["tested"]] == [[1, 1, 2, 3, 16], [1, 3, 4, 5, 16]]
    assert value["environment"] == report.environment
    assert value["policy_sha256"] == decide(report, POLICY, NOW).policy
    assert (value["report_sha256"], value["outcome"]) == ("ab" * 32, "PASS")
    assert value["created"] == "2026-03-04T12:00:00Z"
    assert value["expires"] == "2026-04-01T12:00:00Z"  # 30 days after the report, not the receipt
    assert value["signature"] is None


def test_what_is_signed_is_canonical_and_leaves_the_signature_out(receipt: Receipt) -> None:
    data = canonical_bytes(receipt)
    value = json.loads(data)
    assert "signature" not in value
    whole = json.loads(file_bytes(receipt))
    assert {**value, "signature": None} == whole
    again = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert again.encode() == data


def test_every_key_is_needed_and_no_other_is_known(receipt: Receipt) -> None:
    value = json.loads(file_bytes(receipt))
    free = (("environment",), ("engine", "arguments"), ("model", "files"), ("nccl", "settings"))

    def visit(path: tuple[Any, ...], inner: Any) -> int:
        count = 0
        if isinstance(inner, list):
            return sum(visit((*path, i), one) for i, one in enumerate(inner))
        if isinstance(inner, dict) and path not in free:
            more = copy.deepcopy(value)
            place = more
            for key in path:
                place = place[key]
            place["comment"] = 1
            with pytest.raises(TPCheckError, match="'comment' is no key"):
                parse_receipt(rendered(more))
            for key in inner:
                less = copy.deepcopy(value)
                place = less
                for step in path:
                    place = place[step]
                del place[key]
                with pytest.raises(TPCheckError):
                    parse_receipt(rendered(less))
                count += 1 + visit((*path, key), inner[key])
        return count

    assert parse_receipt(rendered(value)) == receipt
    assert visit((), value) > 35


@pytest.mark.parametrize("new", [None, True, -1, 1.5, "x", [], {}, [[]], {"a": {}}], ids=repr)
def test_a_value_of_another_kind_is_refused_or_free(new: Any, receipt: Receipt) -> None:
    value = json.loads(file_bytes(receipt))
    free = ("environment", "arguments", "settings", "files")
    texts = ("subject", "tpcheck", "backend", "kind", "basis", "name", "version", "gpu", "dtype")
    for path in leaves(value):
        if set(free) & set(path) or path[0] in ("dtypes", "allowed") or path[-1] in texts:
            continue
        if path in (("signature",), ("topology", "gpu_count"), ("allowed",)) and new in (
            None,
            -1,
            [],
        ):
            continue
        if path == ("reduction", "identified") and new == []:
            continue
        if path[0] == "tested" and "lengths" in path and new == -1:
            continue
        with pytest.raises(TPCheckError):
            parse_receipt(rendered(altered(value, path, new)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON in UTF-8"),
        (b"\xff\xfe{\x00}\x00", "not JSON in UTF-8"),
        (b"[" * 200_000, "not JSON in UTF-8"),
        (b"{}", "receipt.schema is missing"),
        (b"[]", "receipt=\\[\\], but should be an object"),
        (b'{"schema": "tpcheck.receipt/2"}', "but should be 'tpcheck.receipt/1'"),
        (b'{"schema": "a", "schema": "a"}', "stands twice"),
        (b'{"schema": NaN}', "NaN is not allowed"),
        (b'{"schema": "tpcheck.receipt/1", "tp": ' + b"9" * 5000 + b"}", "not JSON in UTF-8"),
    ],
)
def test_what_is_no_receipt_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(TPCheckError, match=message):
        read_receipt(tmp_path / "r.json")


def test_the_same_values_in_other_bytes_are_refused(receipt: Receipt) -> None:
    data = file_bytes(receipt)
    value = json.loads(data)
    others = [
        data + b"\n",
        data.rstrip(b"\n"),
        b" " + data,
        b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"),
        data.replace(b'"PASS"', b'"\\u0050ASS"'),
        data.replace(b"0.5", b"0.50"),
        data.replace(b"0.5", b"5e-1"),
        json.dumps(value).encode(),
        json.dumps(dict(reversed(list(value.items()))), indent=1).encode() + b"\n",
    ]
    assert parse_receipt(data) == receipt
    for other in others:
        assert json.loads(other.decode("utf-8-sig")) == value
        with pytest.raises(TPCheckError, match=r"not as tpcheck writes it|not JSON"):
            parse_receipt(other)


def test_every_truncation_is_refused(receipt: Receipt) -> None:
    data = file_bytes(receipt)
    for length in range(len(data)):
        with pytest.raises(TPCheckError):
            parse_receipt(data[:length])


@given(st.data())
@settings(max_examples=200)
def test_a_flipped_byte_is_refused_or_another_receipt(
    receipt: Receipt, data: st.DataObject
) -> None:
    """The reader's part; that another receipt is not accepted is the signature's."""
    whole = bytearray(file_bytes(receipt))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        other = parse_receipt(bytes(whole))
    except TPCheckError:
        return
    assert canonical_bytes(other) != canonical_bytes(receipt)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "é", "\u2028", '"', "\x00"]), json_values))
def test_any_environment_survives_the_trip(receipt: Receipt, environment: dict[str, Any]) -> None:
    made = replace(receipt, environment=environment)
    assert parse_receipt(file_bytes(made)) == made
    assert (canonical_bytes(made) == canonical_bytes(receipt)) == (
        environment == receipt.environment
    )


def test_bytes_of_an_environment_that_are_no_text_are_kept_as_escapes(model: Path) -> None:
    report = make_report(model)
    odd = {**report.environment, "variables": {"NCCL_X": os.fsdecode(b"\xff")}}
    made = make_receipt_of(make_report(model, environment=odd))
    assert parse_receipt(file_bytes(made)) == made


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "endless", "too large"])
def test_a_file_that_cannot_be_read_is_one_error(what: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path = Path("/dev/zero")
    elif what == "too large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(TPCheckError, match=r"r\.json|/dev/zero"):
        read_receipt(path)


def refusing(report: Report, policy: Policy = POLICY) -> str:
    decision = decide(report, policy, NOW)
    assert decision.allowed, [refusal.reason for refusal in decision.refusals]
    with pytest.raises(TPCheckError) as caught:
        make_receipt(report, policy, decision, report_sha256="ab" * 32)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "has no model directory, so no digest; run hf:DIR or ref:DIR"),
        (
            {"model": None, "notes": ("the model has no digest, which a receipt needs: d: empty",)},
            "the model has no digest, which a receipt needs: d: empty; run hf:DIR",
        ),
        ({"engine": None}, "the report does not say engine; make the report anew"),
        ({"reduction": None}, "the report does not say reduction"),
        ({"tested": None}, "the report does not say tested"),
        ({"tested": ()}, "does not say which lengths ran at tp=2 bfloat16"),
    ],
)
def test_no_receipt_without_what_it_has_to_say(
    changes: dict[str, Any], message: str, model: Path
) -> None:
    assert message in refusing(make_report(model, **changes))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nccl_settings", None, "does not say nccl_settings"),
        ("nccl_settings", {"NCCL_ALGO": 1}, "does not say nccl_settings"),
        ("nodes", None, "on how many nodes"),
        ("nodes", True, "on how many nodes"),
        ("gpu_models", ["NVIDIA H200", "NVIDIA L4"], "does not say the GPU"),
        ("nccl_library", 7, "does not say the NCCL version"),
    ],
)
def test_no_receipt_from_an_environment_that_leaves_it_open(
    name: str, value: Any, message: str, model: Path
) -> None:
    facts = {**make_report(model).environment, name: value}
    assert message in refusing(make_report(model, environment=facts))


def test_no_receipt_for_what_was_not_allowed(model: Path) -> None:
    report, policy = make_report(model), Policy(**{**as_fields(POLICY), "tp": (2, 4, 8)})
    decision = decide(report, policy, NOW)
    assert not decision.allowed
    for given_policy in (policy, POLICY):
        with pytest.raises(TPCheckError, match="none for a deployment that was not allowed"):
            make_receipt(report, given_policy, decision, report_sha256="ab" * 32)
    with pytest.raises(TPCheckError, match="not allowed"):  # allowed by another policy
        make_receipt(report, policy, decide(report, POLICY, NOW), report_sha256="ab" * 32)


def as_fields(policy: Policy) -> dict[str, Any]:
    return asdict(policy)


def test_it_speaks_for_the_asked_degrees_and_dtypes_alone(model: Path) -> None:
    report = make_report(model)
    checks = {"structural": Check("PASS"), "drift": Check("FAIL", "far", {"ratio": 9.0})}
    drifting = Verdict("s0-b2-t16", 8, "bfloat16", "DRIFT", checks)
    assert report.tested is not None
    row = {"tp_size": 8, "dtype": "bfloat16", "batch": 2, "lengths": [16]}
    report = make_report(model, verdicts=(*report.verdicts, drifting), tested=(*report.tested, row))
    made = make_receipt_of(report)
    assert (made.tp, made.outcome) == ((2, 4), "PASS")
    assert {row["tp_size"] for row in made.tested} == {2, 4}


def test_without_an_age_limit_it_still_expires(model: Path) -> None:
    policy = Policy(**{**as_fields(POLICY), "max_age_days": None})
    made = make_receipt_of(make_report(model), policy)
    assert made.expires == NOW + timedelta(days=DEFAULT_DAYS)
    far = Policy(**{**as_fields(POLICY), "max_age_days": 1e9})
    assert "is beyond any calendar" in refusing(make_report(model), far)


def test_evidence_of_simulated_ranks_is_named_so(model: Path) -> None:
    policy = Policy(**{**as_fields(POLICY), "backends": ("sim",), "require_deployed_path": False})
    path = RunPath("sim", {}, False, ("backend sim, not nccl",))
    made = make_receipt_of(make_report(model, path=path), policy)
    expected = {"class": "simulated", "gpu": None, "gpu_count": None, "nodes": 1}
    assert made.topology == expected
    assert made.nccl["version"] is None


def test_a_reduction_read_from_outputs_is_named_identified(model: Path) -> None:
    found = {"about": "reduction", "text": "4 row-parallel layers show ring in bfloat16"}
    drift = {"rows": [], "findings": [found, {"about": "allclose", "text": "x"}, 7]}
    made = make_receipt_of(make_report(model, drift=drift))
    expected = {"kind": "ring", "basis": "identified", "identified": [found["text"]]}
    assert made.reduction == expected


def test_reading_one_unpickles_nothing_and_loads_no_torch(receipt: Receipt, tmp_path: Path) -> None:
    write_receipt(receipt, tmp_path / "r.json")
    code = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda name, _: seen.append(name))\n"
        "from tpcheck.deployment_gate.receipts import read_receipt\n"
        f"read_receipt({str(tmp_path / 'r.json')!r})\n"
        "assert 'open' in seen and 'pickle.find_class' not in seen\n"
        "assert not {'torch', 'numpy', 'pickle', 'typer'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
