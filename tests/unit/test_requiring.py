"""A server that was not proven does not start: every difference is a refusal of its own.

Evidence: one deployment that is allowed, and one change of each kind: in the receipt's file, in its
values (signed anew by the right key), in the model, in the machine, in the clock, in our own code.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tpcheck
from tests.receipting import (
    GPU,
    MADE,
    NOW,
    VERSIONS,
    Deployment,
    altered,
    leaves,
    make_here,
    rendered,
)
from tpcheck.deployment_gate import requiring
from tpcheck.deployment_gate.receipts import Receipt, file_bytes, write_receipt
from tpcheck.deployment_gate.requiring import Here, _require
from tpcheck.deployment_gate.signing import new_key, sign
from tpcheck.errors import GateRefused, TPCheckError


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Deployment(tmp_path)


def allowed(start: Deployment, **changes: Any) -> Receipt:
    given_: dict[str, Any] = {
        "receipt": start.path,
        "model_dir": start.model,
        "tp_size": 2,
        "public_key": start.public,
        "dtype": "bfloat16",
        "paranoid": False,
        "here": make_here(),
        "now": NOW + timedelta(hours=1),
    }
    return _require(**{**given_, **changes})


def reasons(start: Deployment, **changes: Any) -> list[str]:
    """Return why this start is refused; each reason comes with a way to settle it."""
    with pytest.raises(GateRefused) as caught:
        allowed(start, **changes)
    found = caught.value.refusals
    assert found
    for refusal in found:
        assert refusal.settle
        assert f"- {refusal.reason}\n  settle: {refusal.settle}" in str(caught.value)
        assert "\n" not in refusal.reason + refusal.settle
    return [refusal.reason for refusal in found]


def only(start: Deployment, **changes: Any) -> str:
    [reason] = reasons(start, **changes)
    return reason


def test_what_was_proven_starts(start: Deployment) -> None:
    assert allowed(start) == start.receipt
    assert allowed(start, tp_size=4, dtype=None, paranoid=True) == start.receipt
    assert allowed(start, receipt=str(start.path), model_dir=str(start.model)) == start.receipt


# the file


def test_a_missing_receipt(start: Deployment) -> None:
    start.path.unlink()
    assert only(start) == f"{start.path}: cannot be read: No such file or directory"


@pytest.mark.parametrize("data", [b"", b"{}", b"\x80\x04N.", b"not json"])
def test_a_corrupt_receipt(data: bytes, start: Deployment) -> None:
    start.path.write_bytes(data)
    assert "is not a tpcheck receipt" in only(start)


def test_a_truncated_receipt(start: Deployment) -> None:
    data = start.path.read_bytes()
    for length in range(0, len(data), 97):
        start.path.write_bytes(data[:length])
        assert "is not a tpcheck receipt" in only(start)


def test_an_unsigned_receipt(start: Deployment) -> None:
    write_receipt(replace(start.receipt, signature=None), start.path)
    assert "unsigned, so anybody may have written it" in only(start)


def test_a_receipt_forged_with_another_key(start: Deployment) -> None:
    other = start.key.with_name("other")
    new_key(other)
    write_receipt(sign(start.receipt, other), start.path)
    assert "is signed by the key" in only(start)
    assert allowed(start, public_key=f"{other}.pub")


def changed(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        digits = "0123456789abcdef"
        if value and set(value) <= set(digits):
            return value[:-1] + digits[digits.index(value[-1]) - 1]
        return value + "x"
    return "x" if value is None else [*value, "x"] if isinstance(value, list) else {"x": "x"}


def test_every_signed_value_altered_by_itself(start: Deployment) -> None:
    """By the signature, where the value is one that a receipt can hold."""
    value = json.loads(start.path.read_bytes())
    by_signature = 0
    paths = leaves(value)
    for path in paths:
        start.path.write_bytes(rendered(altered(value, path, changed(value_at(value, path)))))
        said = only(start)
        by_signature += "altered after it was signed" in said
        assert "altered" in said or "not a tpcheck receipt" in said or "signed by the key" in said
    assert len(paths) > 60
    assert by_signature > len(paths) * 0.8


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_values_that_trade_places(start: Deployment) -> None:
    value = json.loads(start.path.read_bytes())
    for one, two in ((("tp", 0), ("tp", 1)), (("policy_sha256",), ("report_sha256",))):
        traded = altered(value, one, value_at(value, two))
        traded = altered(traded, two, value_at(value, one))
        start.path.write_bytes(rendered(traded))
        assert "altered after it was signed" in only(start)


def test_time_written_so_that_it_still_parses(start: Deployment) -> None:
    value = copy.deepcopy(json.loads(start.path.read_bytes()))
    for text in ("2126-04-01T12:00:00Z", "2026-04-01T12:00:01Z"):
        value["expires"] = text
        start.path.write_bytes(rendered(value))
        assert "altered after it was signed" in only(start)


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_refused(start: Deployment, data: st.DataObject) -> None:
    whole = bytearray(file_bytes(start.receipt))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    start.path.write_bytes(bytes(whole))
    only(start)


@given(st.binary(max_size=400))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_bytes_are_refused(start: Deployment, data: bytes) -> None:
    start.path.write_bytes(data)
    only(start)


def test_nothing_is_believed_before_the_signature_holds(
    start: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bad signature is the one reason, and the model is not even read."""
    monkeypatch.setattr(requiring, "digest_directory", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(requiring, "read_here", lambda: 1 / 0)
    write_receipt(replace(start.receipt, signature=None), start.path)
    assert len(reasons(start, tp_size=64, here=None)) == 1


def test_a_public_key_that_is_not_there(start: Deployment) -> None:
    assert only(start, public_key="none.pub").startswith("none.pub: cannot be read")
    assert "is a private key" in only(start, public_key=start.key)


# what it says, signed by the right key


def test_an_expired_receipt(start: Deployment) -> None:
    expires = start.receipt.expires
    assert expires == MADE + timedelta(days=30)
    assert allowed(start, now=expires - timedelta(seconds=1))
    for now in (expires, expires + timedelta(days=1000)):
        assert only(start, now=now).startswith("it expired at 2026-04-01 12:00:00 UTC, and it is")


def test_a_receipt_from_the_future(start: Deployment) -> None:
    assert allowed(start, now=NOW - timedelta(minutes=5))
    said = only(start, now=NOW - timedelta(minutes=5, seconds=1))
    assert said.startswith("it was made at 2026-03-04 12:00:00 UTC, which is in the future")


@pytest.mark.parametrize("outcome", ["WRONG", "ERROR", "INCONCLUSIVE", "DRIFT", "ILLEGAL"])
def test_an_outcome_that_is_no_pass(outcome: str, start: Deployment) -> None:
    start.signed(outcome=outcome)
    assert only(start) == f"its outcome is {outcome}, which its policy does not let through"


def test_an_outcome_that_the_policy_let_through(start: Deployment) -> None:
    start.signed(outcome="DRIFT", allowed=("DRIFT",))
    assert allowed(start)
    for outcome in ("WRONG", "ERROR", "INCONCLUSIVE"):
        start.signed(outcome=outcome, allowed=(outcome,))
        assert "its outcome is" in only(start)


def test_another_degree(start: Deployment) -> None:
    for tp_size in (1, 3, 8):
        said = only(start, tp_size=tp_size)
        assert said == f"tp_size: 2, 4 was proven, but {tp_size} is asked for"


def test_another_dtype(start: Deployment) -> None:
    assert only(start, dtype="float16") == "dtype: bfloat16 was proven, but float16 is asked for"


@pytest.mark.parametrize("changes", [{"tp_size": True}, {"tp_size": "2"}, {"tp_size": 0}])
def test_a_degree_that_is_none_is_a_usage_error(changes: Any, start: Deployment) -> None:
    with pytest.raises(TPCheckError, match=r"tp_size=.* but should be a whole number"):
        allowed(start, **changes)


def test_a_dtype_that_is_none_is_a_usage_error(start: Deployment) -> None:
    with pytest.raises(TPCheckError, match="dtype='int8', but should be one of bfloat16"):
        allowed(start, dtype="int8")


# the model


def flip(path: Path) -> None:
    """Change one byte; size and mtime stay."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("paranoid", [False, True])
def test_one_byte_of_one_weight(paranoid: bool, start: Deployment) -> None:
    """Caught by the ctime without paranoid, and by reading with it."""
    assert allowed(start)
    flip(start.model / "model-2.safetensors")
    said = only(start, paranoid=paranoid)
    assert said.startswith("weights: ")
    assert said.endswith(": model-2.safetensors differs")


def test_a_cache_that_lies_for_the_attacker_is_caught_by_paranoid(
    start: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpcheck.model_digest._SETTLED_NS", -(10**10))
    assert allowed(start)
    cache = tmp_path / "cache" / "tpcheck" / "digests.json"
    value = json.loads(cache.read_text())
    shard = start.model / "model-2.safetensors"
    flip(shard)
    for row in value["files"]:
        if row[0].endswith("model-2.safetensors"):
            row[3] = shard.stat().st_ctime_ns
    cache.write_text(json.dumps(value))
    assert allowed(start)  # SECURITY.md says so
    assert "model-2.safetensors differs" in only(start, paranoid=True)


def test_swapped_weights(start: Deployment) -> None:
    one, two = (start.model / f"model-{n}.safetensors" for n in (1, 2))
    one.rename(start.model / "x")
    two.rename(one)
    (start.model / "x").rename(two)
    assert only(start).endswith(": model-1.safetensors differs, model-2.safetensors differs")


def test_a_renamed_shard(start: Deployment) -> None:
    (start.model / "model-2.safetensors").rename(start.model / "model-3.safetensors")
    assert "names 'model-2.safetensors', which is not in the directory" in only(start)


def test_a_renamed_shard_with_an_index_that_fits(start: Deployment) -> None:
    (start.model / "model-2.safetensors").rename(start.model / "model-3.safetensors")
    index = start.model / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-2", "model-3"))
    said = only(start)
    assert "model-2.safetensors is missing, model-3.safetensors is new" in said


def test_a_weight_file_too_many(start: Deployment) -> None:
    (start.model / "adapter_model.safetensors").write_bytes(b"x")
    assert only(start).endswith(": adapter_model.safetensors is new")


def test_another_config(start: Deployment) -> None:
    (start.model / "config.json").write_text('{"vocab_size": 9}')
    said = only(start)
    assert said.startswith("config: ")
    assert said.endswith(": config.json differs")


def test_quantization_that_was_added(start: Deployment) -> None:
    (start.model / "hf_quant_config.json").write_text("{}")
    assert only(start).endswith(": hf_quant_config.json is new")


def test_no_model(start: Deployment, tmp_path: Path) -> None:
    said = only(start, model_dir=tmp_path / "none")
    assert said.startswith("the model cannot be read: ")


def test_a_combined_digest_decides_whatever_the_files_say(start: Deployment) -> None:
    model = {**start.receipt.model, "weights_sha256": "0" * 64}
    start.signed(model=model)
    assert only(start).startswith("weights: 0000000000000000... was proven, but ")
    start.signed(model={**model, "files": {}})
    assert only(start).endswith(" is here")


# the machine


def machine_cases() -> list[tuple[dict[str, Any], str]]:
    nccl = "NCCL: 2.28.9 was proven, but "
    return [
        ({"gpus": ("NVIDIA L4",) * 8}, f"GPU: {GPU} was proven, but NVIDIA L4 is here"),
        ({"gpus": (GPU,) * 7 + ("NVIDIA L4",)}, f"GPU: {GPU} was proven, but NVIDIA L4 is here"),
        ({"gpus": None}, f"GPU: {GPU} was proven, but which are visible here cannot be read"),
        ({"gpus": (GPU,)}, "GPUs: tp_size=2 needs 2 here, but 1 are visible"),
        ({"gpus": ()}, "GPUs: tp_size=2 needs 2 here, but 0 are visible"),
        ({"nccl": "2.27.3"}, f"{nccl}2.27.3 is here"),
        ({"nccl": None}, f"{nccl}its version cannot be read here"),
        (
            {"settings": {"NCCL_ALGO": "Tree"}},
            "NCCL_ALGO: Ring was proven, but Tree is here",
        ),
        ({"settings": {}}, "NCCL_ALGO: Ring was proven, but it is not set here"),
        (
            {"settings": {"NCCL_ALGO": "Ring", "NCCL_PROTO": "LL"}},
            "NCCL_PROTO: it was not set when this was proven, but is LL here",
        ),
        (
            {"settings": {"NCCL_ALGO": "Ring", "NCCL_TOKEN": "(hidden)"}},
            "NCCL_TOKEN sounds like a secret, so its value is hidden and cannot be compared",
        ),
        (
            {"settings": {"NCCL_ALGO": "Ring", "NVIDIA_TF32_OVERRIDE": "1"}},
            "NVIDIA_TF32_OVERRIDE: it was not set when this was proven, but is 1 here",
        ),
        ({"driver": "550.1"}, "driver: 570.86.15 was proven, but 550.1 is here"),
        (
            {"driver": None},
            "driver: 570.86.15 was proven, but its version cannot be read here",
        ),
        (
            {"version": {**VERSIONS, "torch": "2.12.0"}.get},
            "torch: 2.13.0 was proven, but 2.12.0 is here",
        ),
        (
            {"version": {"transformers": "5.23.0"}.get},
            "torch: 2.13.0 was proven, but its version cannot be read here",
        ),
        (
            {"version": {**VERSIONS, "transformers": "5.24.0"}.get},
            "engine transformers: 5.23.0 was proven, but 5.24.0 is here",
        ),
        (
            {"version": {"torch": "2.13.0"}.get},
            "engine transformers: 5.23.0 was proven, but its version cannot be read here",
        ),
    ]


@pytest.mark.parametrize(("here", "reason"), machine_cases(), ids=[c[1] for c in machine_cases()])
def test_another_machine(here: dict[str, Any], reason: str, start: Deployment) -> None:
    assert only(start, here=make_here(**here)) == reason


def test_what_is_logged_and_how_many_gpus_are_idle_does_not_matter(start: Deployment) -> None:
    debug = {"NCCL_ALGO": "Ring", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": "/tmp/x"}
    debug |= {"NCCL_DEBUG_TIMESTAMP_FORMAT": "%F", "NCCL_DEBUG_TIMESTAMP_LEVELS": "ALL"}
    assert allowed(start, here=make_here(settings=debug, gpus=(GPU,) * 16))


@pytest.mark.parametrize(
    ("proven", "here", "command"),
    [
        ("=eth0", "=ens5", "export NCCL_SOCKET_IFNAME==eth0; "),
        ("=eth0", None, "export NCCL_SOCKET_IFNAME==eth0; "),
        (None, "=ens5", "unset NCCL_SOCKET_IFNAME; "),
    ],
)
def test_an_interface_that_has_another_name_here_is_settled_with_a_list_for_both(
    proven: str | None, here: str | None, command: str, start: Deployment
) -> None:
    was, now = ({} if value is None else {"NCCL_SOCKET_IFNAME": value} for value in (proven, here))
    start.signed(nccl={**start.receipt.nccl, "settings": was})
    with pytest.raises(GateRefused) as caught:
        allowed(start, here=make_here(settings=now))
    [refusal] = caught.value.refusals
    assert refusal.reason.startswith("NCCL_SOCKET_IFNAME: ")
    assert refusal.settle.startswith(command)
    assert "one list of prefixes" in refusal.settle


def test_a_degree_over_two_machines_needs_half_the_gpus_on_each(start: Deployment) -> None:
    start.signed(topology={**start.receipt.topology, "nodes": 2})
    assert allowed(start, tp_size=4, here=make_here(gpus=(GPU,) * 2))
    said = only(start, tp_size=4, here=make_here(gpus=(GPU,)))
    assert said == "GPUs: tp_size=4 needs 2 here, but 1 are visible"


@pytest.mark.parametrize("what", ["gpu", "nccl", "torch"])
def test_what_the_receipt_leaves_open_refuses(what: str, start: Deployment) -> None:
    held = start.receipt
    changes: dict[str, Any] = {
        "gpu": {"topology": {**held.topology, "gpu": None}},
        "nccl": {"nccl": {**held.nccl, "version": None}},
        "torch": {"environment": {**held.environment, "torch": None}},
    }[what]
    start.signed(**changes)
    assert "the receipt does not say which" in only(start)


def test_evidence_from_the_cpu_needs_no_gpu_but_the_same_torch(start: Deployment) -> None:
    nowhere = {"class": "cpu", "gpu": None, "gpu_count": None, "nodes": 1}
    start.signed(
        backend="gloo",
        topology=nowhere,
        nccl={"version": None, "settings": {}},
        environment={"torch": "2.13.0"},
    )
    here = Here(gpus=None, settings={}, version=VERSIONS.get)
    assert allowed(start, here=here)
    assert only(start, here=replace(here, version={"transformers": "5.23.0"}.get)).startswith(
        "torch"
    )


def test_an_engine_without_a_version_is_not_compared(start: Deployment) -> None:
    start.signed(engine={**start.receipt.engine, "name": "subject", "version": None})
    assert allowed(start)


def test_all_reasons_are_told_at_once_in_order(start: Deployment) -> None:
    flip(start.model / "model-1.safetensors")
    start.signed(outcome="DRIFT")
    here = Here(gpus=("NVIDIA L4",), version=lambda _: None)
    said = reasons(start, tp_size=8, dtype="float16", here=here, now=NOW + timedelta(days=99))
    first = [reason.split(":")[0].split(" at ")[0] for reason in said]
    assert first == [
        "it expired",
        "its outcome is DRIFT, which its policy does not let through",
        "weights",
        "tp_size",
        "dtype",
        "engine transformers",
        "GPU",
        "GPUs",
        "NCCL",
        "NCCL_ALGO",
        "torch",
        "driver",
    ]


# ourselves


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("a bug of ours")


@pytest.mark.parametrize(
    "name", ["read_receipt", "assert_signed", "digest_directory", "read_here", "_nccl", "_time"]
)
def test_an_error_of_ours_refuses(
    name: str, start: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requiring, name, broken)
    said = only(start, here=None if name == "read_here" else make_here())
    assert said == "it cannot be checked: KeyError: 'a bug of ours'"


@pytest.mark.parametrize("value", [None, 7, b"\xff", "a\x00b"])
def test_an_argument_that_is_no_path_refuses(value: Any, start: Deployment) -> None:
    for name in ("receipt", "model_dir", "public_key"):
        reasons(start, **{name: value})


def test_a_name_from_a_forged_file_cannot_rewrite_the_terminal(start: Deployment) -> None:
    start.path.write_bytes(b'{"schema": "tpcheck.receipt/1", "a\\u001b[2J\\nsettle: rm": 1}')
    with pytest.raises(GateRefused) as caught:
        allowed(start)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


# the public function, on this machine


def public(start: Deployment) -> Callable[[], Receipt]:
    return lambda: tpcheck.require(
        start.path, model_dir=start.model, tp_size=2, public_key=start.public
    )


def here_signed(start: Deployment, now: datetime) -> None:
    """Sign a receipt for the very machine that the tests run on."""
    here = requiring.read_here()
    start.signed(
        topology={"class": "cpu", "gpu": None, "gpu_count": None, "nodes": 1},
        nccl={"version": None, "settings": dict(here.settings)},
        environment={"torch": here.version("torch")},
        engine={**start.receipt.engine, "version": here.version("transformers")},
        created=now,
        expires=now + timedelta(days=1),
    )


def test_the_public_function_reads_this_machine_and_clock(
    start: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    here_signed(start, datetime.now(NOW.tzinfo).replace(microsecond=0))
    assert public(start)().tp == (2, 4)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with pytest.raises(GateRefused, match="NCCL_ALGO: it was not set when this was proven"):
        public(start)()
    monkeypatch.delenv("NCCL_ALGO")
    here_signed(start, NOW - timedelta(days=400))
    with pytest.raises(GateRefused, match="it expired at"):
        public(start)()


def test_it_needs_no_torch_and_unpickles_nothing(start: Deployment) -> None:
    here_signed(start, datetime.now(NOW.tzinfo).replace(microsecond=0))
    code = (
        "import sys\nseen = []\n"
        "sys.addaudithook(lambda name, _: seen.append(name))\n"
        "import tpcheck\n"
        f"tpcheck.require({str(start.path)!r}, model_dir={str(start.model)!r}, tp_size=2,"
        f" public_key={str(start.public)!r})\n"
        "assert 'open' in seen and 'pickle.find_class' not in seen\n"
        "assert not {'torch', 'numpy', 'typer', 'rich', 'hypothesis'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
