"""What a record is held against: the first rank, and TP=1 where TP=N was compared elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tpcheck
from tests.golden_records import logits, made
from tpcheck.checks import structural
from tpcheck.evidence import Evidence
from tpcheck.golden.command import golden_record, golden_verify
from tpcheck.golden.judging import against
from tpcheck.golden.tensors import unpack
from tpcheck.trace import Trace

SHORT: dict[str, tuple[int, int]] = {"where": (0, 0)}


@tpcheck.subject(vocab_size=16, seq_len=5)
def build(tp: tpcheck.TPGroup) -> Any:
    embed = tp.weight("embed", 16, 8)
    tokens = -1 if (tp.rank, tp.size) == SHORT["where"] else None
    return lambda input_ids: (embed[input_ids] @ embed.T)[:, :tokens]


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
@pytest.mark.parametrize(
    ("where", "check"),
    [((1, 2), "rank_agreement"), ((0, 2), "structural"), ((0, 1), "structural")],
    ids=["rank 1", "rank 0", "TP=1"],
)
def test_fewer_tokens_than_recorded_are_wrong_and_crash_nothing(
    tmp_path: Path,
    full: bool,
    where: tuple[int, int],
    check: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    golden_record(build, tmp_path, backend="sim", full=full)
    monkeypatch.setitem(SHORT, "where", where)
    (verdict,) = golden_verify(build, tmp_path, (2,), backend="sim").verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.checks[check].outcome == "FAIL"


@pytest.mark.parametrize(("moved", "outcome"), [(0.0, "PASS"), (1e-6, "FAIL")])
def test_where_tp_n_was_compared_at_other_weights_tp_1_is_held(moved: float, outcome: str) -> None:
    golden, data = made()
    whole = logits()
    whole[1, 2, 3] += moved
    now, other = (Trace(0, {"A": one}, {}, {}) for one in (whole, whole + 1))
    evidence = Evidence(
        dtype="bfloat16",
        tp_size=2,
        base=now,
        deployed=[now],
        oracle=now,
        exact=[other],
        elsewhere=(other, other),
    )
    held = against(evidence, golden, unpack(data, golden))
    assert structural(held).outcome == outcome
