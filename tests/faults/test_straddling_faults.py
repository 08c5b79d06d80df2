"""Scales taken across a cut block are wrong numbers, where no plan is at hand to refuse the degree.

Engines load such degrees without a word (tpcheck/engines: "silent_wrong"). With a spec the plan
catches them; a subject without one is judged by its numbers alone.
"""

from __future__ import annotations

import pytest
import torch

import tpcheck
from tpcheck.fault_cells import spec_for
from tpcheck.faults import FAULTS, Fault
from tpcheck.faults.planting import planted_decoder
from tpcheck.reference.decoder import build_decoder
from tpcheck.report import Report
from tpcheck.shard_plan import STRICT

torch.set_num_threads(1)
STRADDLING = [fault for fault in FAULTS.values() if fault.policy != STRICT]
DEGREES = (2, 3, 4, 8)


def run_without_spec(fault: Fault, tp_size: int, planted: bool) -> Report:
    spec = spec_for(fault, tp_size)

    @tpcheck.subject(vocab_size=spec.vocab_size, seq_len=8)
    def build(tp):
        if planted:
            return planted_decoder(spec, fault, tp)
        return build_decoder(spec, tp, policy=fault.policy)

    return tpcheck.run(build, (tp_size,), backend="sim", confirm=False)


def test_each_kind_of_unit_has_a_fault_that_cuts_through_it():
    cut = {
        "down_proj groups": "scale_rows_rounded_down",
        "gate and up blocks": "scale_offsets_rounded_up",
        "KV heads": "scales_by_kv_head",
        "words": "codes_from_where_words_begin",
        "activations": "activation_groups_of_each_rank",
    }
    assert set(cut.values()) <= {fault.name for fault in STRADDLING}
    assert all(fault.caught_by == "plan" for fault in STRADDLING)


@pytest.mark.parametrize("tp_size", DEGREES)
@pytest.mark.parametrize("fault", STRADDLING, ids=lambda fault: fault.name)
def test_scales_across_a_cut_unit_are_seen_in_float64(fault, tp_size):
    (verdict,) = run_without_spec(fault, tp_size, planted=True).verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.checks["structural"].outcome == "FAIL"
    assert verdict.checks["structural"].facts["relative_rms"] > 1e-4


@pytest.mark.parametrize("tp_size", DEGREES)
@pytest.mark.parametrize("fault", STRADDLING, ids=lambda fault: fault.name)
def test_the_same_cut_with_copied_scales_is_the_same_function(fault, tp_size):
    (verdict,) = run_without_spec(fault, tp_size, planted=False).verdicts
    assert verdict.outcome == "PASS"
    assert verdict.checks["structural"].facts["relative_rms"] < 1e-13
