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


@pytest.mark.parametrize(
    ("world", "local", "nodes"),
    [("16", "8", 2), ("9", "8", 2), ("8", "8", 1), ("", "", 1), ("x", "8", 1), ("8", "0", 1)],
)
def test_nodes_are_those_that_torchrun_spans(
    world: str, local: str, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert environment.collect()["nodes"] == nodes


def test_settings_of_nccl_are_there_without_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("NCCL_MY_TOKEN", "s3cret")
    found = environment.collect()["nccl_settings"]
    assert (found["NCCL_ALGO"], found["NCCL_MY_TOKEN"]) == ("Ring", "(hidden)")
