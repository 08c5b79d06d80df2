"""Records of checkpoints: streamed or whole the same, and of these very bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load, save

from tests.golden_records import kept_in, with_data
from tests.models import make_model
from tpcheck.errors import TPCheckError
from tpcheck.golden.command import golden_record, golden_verify
from tpcheck.golden.store import read_data, scan

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("golden") / "llama", "llama")


def test_a_streamed_record_is_that_of_the_whole_model(tmp_path: Path, model: Path) -> None:
    subject = f"ref:{model}"
    streamed = golden_record(subject, tmp_path / "streamed", stream=True, backend="sim", seq_len=6)
    whole = golden_record(subject, tmp_path / "whole", backend="sim", seq_len=6)
    assert streamed["records"][0]["address"] == whole["records"][0]["address"]
    (one,), (other,) = scan(tmp_path / "streamed"), scan(tmp_path / "whole")
    assert one.golden is not None
    assert other.golden is not None
    assert one.golden.logits == other.golden.logits  # the bits of every input, oracle included
    assert one.golden.data.sha256 == other.golden.data.sha256
    assert len(list((tmp_path / "streamed").iterdir())) == 2  # no scratch is left


def test_a_degree_is_held_to_a_streamed_record_without_tp1(tmp_path: Path, model: Path) -> None:
    subject = f"ref:{model}"
    golden_record(subject, tmp_path, stream=True, backend="sim", seq_len=6)
    report = golden_verify(subject, tmp_path, (2, 6), backend="sim")
    assert report.outcome == "PASS", report.verdicts
    for verdict in report.verdicts:
        assert {verdict.checks[name].outcome for name in ("structural", "drift", "schedule")} == {
            "PASS"
        }
        assert "TP=1 was not run: it is as recorded" in verdict.reasons
    assert golden_verify(subject, tmp_path, (1, 2), backend="sim").outcome == "PASS"


def test_a_degree_that_leaves_a_streamed_oracle_is_wrong_without_tp1(
    tmp_path: Path, model: Path
) -> None:
    subject = f"ref:{model}"
    golden_record(subject, tmp_path / "made", stream=True, backend="sim", seq_len=4)
    (entry,) = scan(tmp_path / "made")
    assert entry.golden is not None
    tensors = load(read_data(tmp_path / "made", entry.golden))
    tensors["A.oracle.sums"][3, 5] += 1e-6
    data = save(tensors)
    kept_in(tmp_path / "moved", with_data(entry.golden, data), data)
    (verdict,) = golden_verify(subject, tmp_path / "moved", (2,), backend="sim").verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.checks["structural"].facts["worst_input"] == "A"


def test_one_byte_of_one_weight_is_another_model(tmp_path: Path, model: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    subject, folder = f"ref:{copy}", tmp_path / "golden"
    golden_record(subject, folder, backend="sim", seq_len=4)
    weights = next(copy.glob("*.safetensors"))
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(bytes(whole))
    report = golden_verify(subject, folder, (1, 2), backend="sim")
    assert report.outcome == "INCONCLUSIVE"
    assert f"weights: {weights.name} is another" in report.verdicts[0].reasons[0]


def test_only_a_checkpoint_can_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(TPCheckError, match="but should be ref:DIR"):
        golden_record("builtin:llama-tiny", tmp_path, stream=True, backend="sim")
    assert list(tmp_path.iterdir()) == []
