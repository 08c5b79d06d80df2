"""Explanations as pure functions of evidence: what they leave out of drift, and what they keep."""

from __future__ import annotations

import pytest
import torch

from tests.judging import ranks, rounded, trace, values
from tpcheck.checks import drift
from tpcheck.drift_explanations import without_flipped
from tpcheck.evidence import Evidence

QUANTUM = 0.05
"""What one value at another code moves a few of the logits by: hundreds of eps of float32."""


def measured_again(flipped: int, weights: int = 9) -> Evidence:
    """Return a case at `weights` weights an ulp apart; at the last `flipped` one value flips."""
    keys = ["A", *(f"A with other weights {seed}" for seed in range(1, weights))]
    oracle = {key: values(4, 64, seed=seed) for seed, key in enumerate(keys)}
    base = {key: rounded(x, torch.float32, 100) for key, x in oracle.items()}
    deployed = {key: rounded(x, torch.float32, 200) for key, x in oracle.items()}
    for key in keys[weights - flipped :]:
        deployed[key][2] += QUANTUM
    return Evidence(
        dtype="float32",
        tp_size=2,
        base=trace(0, base),
        deployed=ranks(deployed),
        oracle=trace(0, oracle),
    )


@pytest.mark.parametrize("flipped", [1, 4])
def test_weights_at_which_a_value_flipped_are_left_out_of_drift(flipped):
    found = measured_again(flipped)
    assert drift(found).outcome == "FAIL"
    kept, notes = without_flipped(found)
    assert len(kept.flipped) == flipped
    assert drift(kept).outcome == "PASS"
    assert notes == (
        f"codes: at {flipped} of 9 weights an ulp apart a value fell to another code in TP=N;"
        " drift leaves them out",
    )


@pytest.mark.parametrize("flipped", [5, 9])
def test_what_shows_at_most_weights_is_no_flip(flipped):
    found = measured_again(flipped)
    assert without_flipped(found) == (found, ())
    assert drift(found).outcome == "FAIL"
