"""The full text of what people read when a receipt, a key or a model is not what it should be."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.receipting import NOW, Deployment, make_here, make_receipt_of, make_report
from tpcheck.cli_commands.receipts import assert_one_thing
from tpcheck.deployment_gate.receipts import parse_receipt, write_receipt
from tpcheck.deployment_gate.requiring import Here, _require
from tpcheck.deployment_gate.signing import new_key, sign
from tpcheck.errors import GateRefused, TPCheckError
from tpcheck.model_digest import digest_directory

AGAIN = "prove it here: `tpcheck run`, then `tpcheck gate REPORT.json --receipt PATH --sign KEY`"
NAME = "name a signed receipt and the public key of its signer"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Deployment(tmp_path)


def refused(here: Here | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {
        "receipt": "receipt.json",
        "model_dir": "model",
        "tp_size": 2,
        "public_key": "key.pub",
        "dtype": None,
        "paranoid": False,
        "here": here or make_here(),
        "now": NOW,
    }
    with pytest.raises(GateRefused) as caught:
        _require(**{**given, **changes})
    return str(caught.value)


def test_a_start_that_differs_in_several_ways(start: Deployment) -> None:
    here = make_here(
        gpus=("NVIDIA L4",) * 4, nccl="2.27.3", settings={"NCCL_ALGO": "a b", "NCCL_PROTO": "LL"}
    )
    now = NOW + timedelta(days=30)
    assert refused(here, tp_size=8, dtype="float16", now=now) == (
        "REFUSED: model at tp_size=8, by receipt.json: 8 reasons\n"
        "- it expired at 2026-04-01 12:00:00 UTC, and it is 2026-04-03 12:00:00 UTC here\n"
        f"  settle: {AGAIN}\n"
        "- tp_size: 2, 4 was proven, but 8 is asked for\n"
        f"  settle: start at a proven degree, or {AGAIN}\n"
        "- dtype: bfloat16 was proven, but float16 is asked for\n"
        f"  settle: start in a proven dtype, or {AGAIN}\n"
        "- GPU: NVIDIA H200 was proven, but NVIDIA L4 is here\n"
        f"  settle: {AGAIN}\n"
        "- GPUs: tp_size=8 needs 8 here, but 4 are visible\n"
        "  settle: look at CUDA_VISIBLE_DEVICES, or start on a machine that has them\n"
        "- NCCL: 2.28.9 was proven, but 2.27.3 is here\n"
        f"  settle: {AGAIN}\n"
        "- NCCL_ALGO: Ring was proven, but a b is here\n"
        "  settle: export NCCL_ALGO=Ring\n"
        "- NCCL_PROTO: it was not set when this was proven, but is LL here\n"
        "  settle: unset NCCL_PROTO"
    )


def test_one_byte_of_one_weight(start: Deployment) -> None:
    before = digest_directory("model").weights_sha256[:16]
    shard = start.model / "model-2.safetensors"
    shard.write_bytes(b"!" + shard.read_bytes()[1:])
    after = digest_directory("model").weights_sha256[:16]
    assert refused() == (
        "REFUSED: model at tp_size=2, by receipt.json: 1 reason\n"
        f"- weights: {before}... was proven, but {after}... is here: model-2.safetensors differs\n"
        f"  settle: put back what was proven, or {AGAIN}"
    )


def test_a_receipt_that_was_edited(start: Deployment) -> None:
    text = start.path.read_text()
    start.path.write_text(text.replace('"PASS"', '"DRIFT"'))
    assert refused() == (
        "REFUSED: model at tp_size=2, by receipt.json: 1 reason\n"
        "- the signature is not that of this content: the receipt was altered after it was"
        " signed, or the signature is forged\n"
        f"  settle: {NAME}"
    )
    start.path.write_text(text.replace("{\n", "{\n\n", 1))
    assert refused() == (
        "REFUSED: model at tp_size=2, by receipt.json: 1 reason\n"
        "- receipt.json: is not a tpcheck receipt: line 2 is not as tpcheck writes it; a receipt"
        " is used as it was written, it cannot be edited or formatted\n"
        f"  settle: {NAME}"
    )


def test_a_receipt_of_somebody_else(start: Deployment) -> None:
    assert start.receipt.signature is not None
    ours = start.receipt.signature.key[:16]
    theirs = new_key("other")[:16]
    write_receipt(sign(start.receipt, "other"), "receipt.json")
    assert refused() == (
        "REFUSED: model at tp_size=2, by receipt.json: 1 reason\n"
        f"- the receipt is signed by the key {theirs}..., but should be by {ours}..., the one in"
        " key.pub\n"
        f"  settle: {NAME}"
    )
    write_receipt(make_receipt_of(make_report(start.model)), "receipt.json")
    assert refused() == (
        "REFUSED: model at tp_size=2, by receipt.json: 1 reason\n"
        "- the receipt is unsigned, so anybody may have written it; sign it with"
        " `tpcheck gate REPORT.json --policy FILE --receipt PATH --sign KEY`\n"
        f"  settle: {NAME}"
    )


def test_no_receipt_at_all(start: Deployment) -> None:
    assert refused(receipt="none.json") == (
        "REFUSED: model at tp_size=2, by none.json: 1 reason\n"
        "- none.json: cannot be read: No such file or directory\n"
        f"  settle: {NAME}"
    )


def test_a_machine_that_cannot_be_read(start: Deployment) -> None:
    assert refused(make_here(gpus=None, nccl=None, driver=None)) == (
        "REFUSED: model at tp_size=2, by receipt.json: 3 reasons\n"
        "- GPU: NVIDIA H200 was proven, but which are visible here cannot be read\n"
        "  settle: pip install nvidia-ml-py; name whole GPUs in CUDA_VISIBLE_DEVICES; where they"
        " differ, set CUDA_DEVICE_ORDER=PCI_BUS_ID\n"
        "- NCCL: 2.28.9 was proven, but its version cannot be read here\n"
        "  settle: call this in the environment that runs the server, on a machine that has it\n"
        "- driver: 570.86.15 was proven, but its version cannot be read here\n"
        "  settle: call this in the environment that runs the server, on a machine that has it"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{}", "receipt.schema is missing, but should be text"),
        (
            b'{"schema": "tpcheck.receipt/2"}',
            "receipt.schema='tpcheck.receipt/2', but should be 'tpcheck.receipt/1'",
        ),
        (
            b'{"schema": "tpcheck.receipt/1", "note": 1}',
            "receipt.'note' is no key of a tpcheck.receipt/1",
        ),
        (
            b'{"schema": "tpcheck.receipt/1", "created": "2026-02-30T00:00:00Z"}',
            "receipt.created='2026-02-30T00:00:00Z', but should be a time like"
            " 2026-01-31T12:00:00Z",
        ),
    ],
)
def test_what_is_no_receipt(data: bytes, message: str) -> None:
    with pytest.raises(TPCheckError) as caught:
        parse_receipt(data)
    assert str(caught.value) == message


def test_keys(start: Deployment) -> None:
    start.key.chmod(0o644)
    with pytest.raises(TPCheckError) as caught:
        sign(start.receipt, "key")
    assert str(caught.value) == (
        "key: has mode 0644, so that others can use it, but should have 0600: chmod 600 key"
    )
    with pytest.raises(TPCheckError) as caught:
        new_key("key")
    assert str(caught.value) == "key: is there already and is not overwritten; name another"


def test_models(start: Deployment) -> None:
    (start.model / "model-2.safetensors").unlink()
    with pytest.raises(TPCheckError) as caught:
        digest_directory("model")
    assert str(caught.value) == (
        "model/model.safetensors.index.json: names 'model-2.safetensors', which is not in the"
        " directory"
    )


def test_options() -> None:
    given = dict.fromkeys(("--new-key", "--verify", "--sign", "--receipt", "--tp"))
    with pytest.raises(TPCheckError) as caught:
        assert_one_thing({**given, "--sign": Path("key")})
    assert str(caught.value) == "--sign: signs a receipt, but --receipt PATH is missing"
