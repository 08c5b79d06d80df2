"""The environment of a report: plain JSON, complete, and free of secrets."""

import json

import pytest
import torch

from tpcheck import environment


def test_it_is_plain_json_and_names_what_the_contract_shows() -> None:
    facts = environment.collect(backend="gloo", device="cpu")
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["torch"] == torch.__version__
    assert (facts["backend"], facts["device"], facts["tf32"]) == ("gloo", "cpu", False)
    assert {"python", "platform", "cpu", "cores", "numpy", "num_threads"} <= set(facts)


def test_only_known_prefixes_are_kept_and_never_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("TORCH_API_KEY", "s3cret")
    monkeypatch.setenv("HF_HOME", "s3cret")
    facts = environment.collect()
    assert facts["variables"]["NCCL_ALGO"] == "Ring"
    assert facts["variables"]["TORCH_API_KEY"] == "(hidden)"
    assert "s3cret" not in json.dumps(facts)


def test_flags_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.collect()["deterministic_algorithms"] is False
    torch.use_deterministic_algorithms(True)
    try:
        assert environment.collect()["deterministic_algorithms"] is True
    finally:
        torch.use_deterministic_algorithms(False)


def test_tf32_is_seen_however_it_was_set() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        assert environment.collect()["tf32"] is True
    finally:
        matmul.allow_tf32 = before
    assert environment.collect()["tf32"] is False
