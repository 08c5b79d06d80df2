"""A policy asks for what its author thinks it asks for, or is an error that names the key.

Evidence: the contract's own example; one wrong value per rule; digests; and any JSON-like value.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gate_reports import POLICY
from tpcheck.deployment_gate.policy import (
    DEFAULT_REQUIRE,
    Policy,
    parse_policy,
    policy_digest,
    policy_json,
    read_policy,
)
from tpcheck.errors import TPCheckError
from tpcheck.files import MAX_TOML_BYTES

CONTRACT = """
[policy]
tp = [2, 4, 8]                 # every degree must be proven
dtypes = ["bfloat16"]
backends = ["nccl"]
require = ["structural", "drift", "rank_agreement", "repeatability"]
require_deployed_path = true   # default
min_sensitivity = 0.95         # default; needs a report made with --sensitivity
min_cases = 1
max_drift_ratio = 3.0
max_argmax_flip_margin = 0.05
max_age_days = 30
allow = []                     # outcomes besides PASS that are let through
[policy.match]                 # environment fields that must be equal to the given values
torch = "2.13.0"
"""
LEAST = {"tp": [2], "dtypes": ["bfloat16"], "backends": ["nccl"]}


def test_the_contracts_policy_is_read(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(CONTRACT)
    policy = read_policy(tmp_path / "policy.toml")
    assert policy == Policy(
        tp=(2, 4, 8),
        dtypes=("bfloat16",),
        backends=("nccl",),
        max_drift_ratio=3.0,
        max_argmax_flip_margin=0.05,
        max_age_days=30.0,
        match={"torch": "2.13.0"},
    )


def test_defaults_ask_for_the_deployed_path_and_for_sensitivity() -> None:
    policy = parse_policy(LEAST)
    assert policy.require == DEFAULT_REQUIRE
    assert policy.require_deployed_path is True
    assert (policy.min_sensitivity, policy.min_cases, policy.allow) == (0.95, 1, ())


@pytest.mark.parametrize("name", LEAST)
def test_a_policy_without_degrees_dtypes_or_backends_is_an_error(name: str) -> None:
    with pytest.raises(TPCheckError, match=rf"^policy\.{name}: is missing, but should be a list"):
        parse_policy({key: value for key, value in LEAST.items() if key != name})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tp", [], "policy.tp=[], but should be a list of at least one of degrees"),
        ("tp", 2, "policy.tp=2, but should be a list of degrees"),
        ("tp", [True], "policy.tp=True, but should be a list of whole numbers of at least 1"),
        ("tp", [2.0], "policy.tp=2.0, but should be a list of whole numbers of at least 1"),
        ("tp", [0], "policy.tp=0, but should be a list of whole numbers of at least 1"),
        ("tp", [2, -4], "policy.tp=-4, but should be a list of whole numbers of at least 1"),
        ("tp", [2, 4, 2], "policy.tp=[2, 4, 2], but should be a list that names 2 once"),
        ("tp", ["2"], "policy.tp='2', but should be a list of whole numbers of at least 1"),
        ("dtypes", "bfloat16", "policy.dtypes='bfloat16', but should be a list of bfloat16,"),
        ("dtypes", ["bf16"], "did you mean 'bfloat16'?"),
        ("backends", [], "policy.backends=[], but should be a list of at least one of nccl,"),
        ("backends", ["ncll"], "did you mean 'nccl'?"),
        ("backends", ["auto"], "policy.backends='auto', but should be one of nccl, nccl-loopback"),
        ("require", [], "policy.require=[], but should be a list of at least one of plan,"),
        ("require", ["structral"], "did you mean 'structural'?"),
        ("require", [["drift"]], "policy.require=['drift'], but should be a list of texts"),
        ("require_deployed_path", 1, "policy.require_deployed_path=1, but should be true or false"),
        ("require_deployed_path", "no", "but should be true or false"),
        ("min_sensitivity", 1.01, "policy.min_sensitivity=1.01, but should be a number from 0"),
        ("min_sensitivity", True, "policy.min_sensitivity=True, but should be a number from 0"),
        ("min_sensitivity", float("nan"), "policy.min_sensitivity=nan"),
        ("min_cases", 0, "policy.min_cases=0, but should be a whole number of at least 1"),
        ("min_cases", 1.0, "policy.min_cases=1.0, but should be a whole number"),
        ("max_drift_ratio", 0, "policy.max_drift_ratio=0, but should be a finite number above 0"),
        ("max_drift_ratio", float("inf"), "policy.max_drift_ratio=inf"),
        ("max_drift_ratio", 10**400, "policy.max_drift_ratio=1000"),
        ("max_epsilons", "2", "policy.max_epsilons='2', but should be a finite number above 0"),
        ("max_required_atol", -1, "policy.max_required_atol=-1, but should be a finite number of"),
        ("max_argmax_flip_margin", False, "policy.max_argmax_flip_margin=False, but should be"),
        ("max_age_days", 0, "policy.max_age_days=0, but should be a finite number above 0"),
        ("max_age_days", None, "policy.max_age_days=None, but should be a value, or left out"),
        ("subject", " ", "policy.subject=' ', but should be a text that is not empty"),
        ("engines", [], "policy.engines=[], but should be a list of at least one of names"),
        ("engines", "vllm", "policy.engines='vllm', but should be a list of names"),
        ("allow", ["WRONG"], "but should be DRIFT or ILLEGAL: WRONG is never let through"),
        ("allow", ["DRIFT", "ERROR"], "but should be DRIFT or ILLEGAL: ERROR is never let through"),
        ("allow", ["INCONCLUSIVE"], "INCONCLUSIVE is never let through"),
        ("allow", ["drift"], "did you mean 'DRIFT'?"),
        ("allow", "DRIFT", "policy.allow='DRIFT', but should be a list of DRIFT, ILLEGAL"),
        ("match", ["torch"], "but should be a table of environment fields and their values"),
        ("match", {"a": {}}, "policy.match.a={}, but should be a value"),
        ("match", {"a": {"b": 1}, "a.b": 1}, "policy.match='a.b', but should be there once"),
        ("match", {"a": float("nan")}, "policy.match.a=nan, but should be a text, a finite number"),
        ("match", {"a..b": 1}, "policy.match='a..b', but should be names of environment fields"),
    ],
)
def test_a_value_that_means_nothing_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(TPCheckError) as refused:
        parse_policy({**LEAST, name: value})
    assert message in str(refused.value)
    if value is not None:
        with pytest.raises(TPCheckError) as again:
            Policy(**{**LEAST, name: value})
        assert str(again.value) == str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("min_case", "policy.min_case: is no key of a policy; did you mean min_cases?"),
        ("max_drift", "policy.max_drift: is no key of a policy; did you mean max_drift_ratio?"),
        ("TP", "policy.TP: is no key of a policy; did you mean tp?"),
        ("xyzzy", "policy.xyzzy: is no key of a policy; keys are tp, dtypes, backends,"),
    ],
)
def test_an_unknown_key_is_an_error_that_says_what_was_meant(name: str, message: str) -> None:
    with pytest.raises(TPCheckError) as refused:
        parse_policy({"policy": {**LEAST, name: 1}})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"tp = [2]", "[policy] is missing"),
        (b"[polciy]\ntp = [2]", "[policy] is missing; it has [polciy]"),
        (b"", "[policy] is missing"),
        (b"policy = 3", "policy=3, but should be a table"),
        (b"[policy]\ntp = [2]\n[match]\nx = 1", "match: is no table of a policy"),
        (b"[policy]\ntp = [2]\ntp = [4]", "is not TOML"),
        (b"[policy", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"x = " + b"[" * 100_000, "is not TOML"),
        (b"#" * (MAX_TOML_BYTES + 1), "is larger than 1048576 bytes"),
        (b"[policy]\ntp = [" + b"9" * 5000 + b"]", "is not TOML"),
        (
            b"[policy]\ntp=[2]\ndtypes=['bfloat16']\nbackends=['sim']\nmatch.d = 2026-01-01",
            "match.d",
        ),
    ],
)
def test_a_file_that_is_no_policy_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(text)
    with pytest.raises(TPCheckError) as refused:
        read_policy(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["none.toml", ".", "a\0b", "/dev/zero"])
def test_what_cannot_be_read_is_one_error(path: str) -> None:
    if path.startswith("/dev") and not os.path.exists(path):
        pytest.skip("no such device here")
    with pytest.raises(TPCheckError):
        read_policy(path)


def test_the_digest_is_of_what_is_asked_for() -> None:
    first = policy_digest(parse_policy(POLICY))
    written_out = {**POLICY, "require_deployed_path": True, "min_sensitivity": 0.95, "allow": []}
    turned = {**dict(reversed(written_out.items())), "tp": [4, 2], "max_age_days": 30.0}
    assert first == policy_digest(parse_policy({"policy": turned}))
    assert len(first) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"tp": [2]},
        {"tp": [2, 8]},
        {"dtypes": ["bfloat16"]},
        {"backends": ["gloo"]},
        {"require": ["structural"]},
        {"require_deployed_path": False},
        {"min_sensitivity": 0.5},
        {"min_cases": 3},
        {"max_drift_ratio": 3.5},
        {"max_epsilons": 2.5},
        {"max_required_atol": 0.06},
        {"max_argmax_flip_margin": 0.06},
        {"max_age_days": 31},
        {"subject": "other.py:build"},
        {"engines": ["sglang"]},
        {"allow": ["DRIFT"]},
        {"match": {"torch": "2.14.0"}},
        {"match": {"torch": "2.13.0", "variables.NCCL_ALGO": "Tree"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_demand_has_another_digest(change: dict[str, Any]) -> None:
    assert policy_digest(parse_policy({**POLICY, **change})) != policy_digest(parse_policy(POLICY))


def test_a_policy_survives_its_own_json() -> None:
    policy = parse_policy(POLICY)
    stored = {name: value for name, value in policy_json(policy).items() if value is not None}
    assert parse_policy(stored) == policy


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*POLICY, "allow", "tps"]), VALUES, max_size=4))
def test_any_value_makes_a_policy_or_one_clear_error(changes: dict[str, Any]) -> None:
    message = ""
    try:
        policy = parse_policy({**POLICY, **changes})
    except TPCheckError as error:
        message = str(error)
    if message:
        assert message.startswith("policy")
        assert "\n" not in message
        return
    assert "tps" not in changes
    assert not {"WRONG", "ERROR", "INCONCLUSIVE"} & set(policy.allow)
    assert policy.tp
    assert policy.backends
    assert len(policy_digest(policy)) == 64
