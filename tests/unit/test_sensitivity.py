"""What a PASS would have caught: everything in clean code, and by name what nothing can show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tpcheck
from tests.groups import single_group
from tpcheck.cli import app
from tpcheck.observation.planting import CollectiveSite, Plant, Planter, Survey
from tpcheck.records import PASS, Report, Verdict
from tpcheck.records import Path as RunPath
from tpcheck.render.html import render_html
from tpcheck.render.markdown import render_markdown
from tpcheck.render.text import render_text
from tpcheck.report import read_report
from tpcheck.sensitivity import (
    Fault,
    blind_to,
    collective_faults,
    spread,
    weight_faults,
)

torch.set_num_threads(1)


def measured(subject: Any, tp_size: int = 2, backend: str = "sim", **options: Any) -> Any:
    report = tpcheck.run(subject, (tp_size,), backend=backend, sensitivity=True, **options)
    assert report.outcome == "PASS"
    assert report.sensitivity is not None, report.notes
    return report.sensitivity


def exponent(facts: Mapping[str, Any]) -> int:
    return int(facts["smallest_scale_bug"].removeprefix("2^-"))


# Whole subjects.


@pytest.mark.parametrize("tp_size", [2, 4])
def test_everything_is_caught_in_a_clean_subject(tp_size: int) -> None:
    facts = measured("builtin:llama-tiny", tp_size)
    assert facts["caught"] == facts["planted"] > 100
    assert facts["blind_to"] == []
    assert facts["left_out"] == 0
    assert exponent(facts) >= 20
    assert facts["computed_in"] == "float64"


def test_what_moves_no_logit_is_named() -> None:
    facts = measured("tests.subjects.blind_spots:build")
    assert facts["blind_to"] == [
        "adapter.weight",
        "score.bias",
        "rotary.inv_freq",
        "all_reduce #2",
    ]
    assert facts["planted"] - facts["caught"] == 4
    assert exponent(facts) >= 20  # of the reduction that is seen


def test_a_key_bias_that_softmax_cancels_is_named() -> None:
    facts = measured("builtin:gpt2-tiny", 2)
    layers = [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in range(2)]
    assert facts["blind_to"] == layers


@pytest.mark.parametrize("name", ["always", "when_split"])
def test_a_float32_sum_hides_nothing_that_float64_shows(name: str) -> None:
    narrow = measured(f"tests.subjects.float32_reduce:{name}")
    assert narrow["caught"] == narrow["planted"]
    assert exponent(narrow) > 24  # which is what float32's own bits would show


def test_without_float64_drift_has_to_notice() -> None:
    facts = measured("tests.subjects.half_only:build")
    assert facts["computed_in"] == "bfloat16"
    assert exponent(facts) < 10
    assert 0 < facts["caught"] <= facts["planted"]


def test_gathers_and_reduce_scatters() -> None:
    facts = measured("tests.subjects.sequence_parallel:build", 4)
    assert facts["caught"] == facts["planted"]
    assert exponent(facts) >= 20


@tpcheck.subject(vocab_size=32, seq_len=4)
def gathered_and_summed(tp: Any) -> Any:
    """Which piece is whose does not matter to a sum: swapping two of them is no fault."""
    embed = tp.weight("embed", 32, 16)
    up = tp.weight("up", 16, 16).chunk(tp.size, 0)[tp.rank]
    down = tp.weight("down", 16, 16).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids: torch.Tensor) -> Any:
        x = embed[input_ids]
        terms = tp.all_gather((x @ up.T).relu().unsqueeze(0) @ down.T, 0)
        return (x + terms.sum(0)) @ embed.T

    return forward


def test_a_swap_that_changes_nothing_is_no_fault() -> None:
    facts = measured(gathered_and_summed, 4)
    assert facts["caught"] == facts["planted"]
    assert facts["without_effect"] >= 1


@tpcheck.subject(vocab_size=32, seq_len=4)
def refuses_nonsense(tp: Any) -> Any:
    """Raises where a planted fault shows, as a subject with assertions of its own would."""
    embed = tp.weight("embed", 32, 16)
    one = torch.ones(1, dtype=tp.dtype) / tp.size

    def forward(input_ids: torch.Tensor) -> Any:
        total = tp.all_reduce(one)
        if abs(float(total) - 1) > 1e-3:
            raise RuntimeError(f"total={float(total)}, but should be 1")
        return embed[input_ids] @ embed.T * total

    return forward


def test_a_rank_that_raises_has_noticed() -> None:
    facts = measured(refuses_nonsense)
    assert facts["caught"] == facts["planted"]
    assert facts["blind_to"] == []


@tpcheck.subject(inputs=lambda generator: torch.randn(4, 8, generator=generator))
def only_a_sum(tp: Any) -> Any:
    return lambda x: tp.all_reduce(x / tp.size)


@tpcheck.subject(inputs=lambda generator: torch.randn(4, 8, generator=generator))
def nothing_to_plant(tp: Any) -> Any:
    return lambda x: x * 2


def test_a_subject_without_sites_is_not_measured() -> None:
    report = tpcheck.run(nothing_to_plant, (2,), backend="sim", sensitivity=True)
    assert report.sensitivity is None
    assert any("sensitivity was not measured: no weight" in note for note in report.notes)


def test_a_wrong_subject_is_not_measured() -> None:
    subject = "tests.subjects.buggy:missing_all_reduce"
    report = tpcheck.run(subject, (2,), backend="sim", confirm=False, sensitivity=True)
    assert (report.outcome, report.sensitivity) == ("WRONG", None)
    assert any("sensitivity was not measured: no verdict" in note for note in report.notes)


# Code that calls torch.distributed itself, on real ranks.


def test_in_place_calls_on_a_process_group() -> None:
    facts = measured("tests.subjects.own_process_group:build", backend="gloo")
    assert facts["caught"] == facts["planted"]
    assert exponent(facts) >= 20  # so its all_reduce calls were reached
    assert facts["backend"] == "gloo"


def test_functional_collectives_of_dtensor() -> None:
    facts = measured("tests.subjects.dtensor:local_logits", backend="gloo")
    assert facts["caught"] == facts["planted"]
    assert exponent(facts) >= 20


def test_a_subject_that_can_is_planted_in_simulation() -> None:
    facts = measured("tests.subjects.named_weights:build", backend="gloo")
    assert facts["backend"] == "sim"


# The command line and the report.


def test_the_line_under_a_pass_and_the_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    arguments = ["run", "tests.subjects.blind_spots:build", "--tp", "2", "--backend", "sim"]
    done = CliRunner().invoke(app, [*arguments, "--sensitivity", "--json", str(path)])
    assert done.exit_code == 0, done.output
    facts = json.loads(path.read_text())["sensitivity"]
    assert {"caught", "planted", "blind_to", "smallest_scale_bug"} <= set(facts)
    line = f"would have caught {facts['caught']}/{facts['planted']}; blind to: adapter.weight"
    head, second, *_ = done.stdout.splitlines()
    assert head.startswith("PASS")
    assert second == f"{line}, score.bias, rotary.inv_freq and 1 more"
    assert read_report(path).sensitivity == facts


def report(outcome: str) -> Report:
    facts = {"caught": 41, "planted": 42, "blind_to": ["layers.1.mlp.bias"], "tp_size": 4}
    facts |= {"smallest_scale_bug": "2^-37", "without_effect": 3, "left_out": 12}
    verdict = Verdict("s0-b2-t16", 4, "bfloat16", outcome, {}, () if outcome == PASS else ("x",))
    return Report("m.py:build", (verdict,), {}, RunPath("nccl", {}, True), "0.1.0", facts)


def test_what_a_reader_sees() -> None:
    text = render_text(report(PASS))
    head, line, *_ = text.splitlines()
    assert head == "PASS  m.py:build  tp 4 · bfloat16 · nccl"
    assert line == "would have caught 41/42; blind to: layers.1.mlp.bias"
    assert " ".join(text[text.index("sensitivity  ") :].split()).startswith(
        "sensitivity caught 41 of 42 faults planted at tp=4; one partial of a sum scaled by"
        " 1+2^-37 is still caught; 3 changed nothing; 12 more could be planted"
    )
    assert line in render_markdown(report(PASS)).replace("\\", "")
    assert line in render_html(report(PASS))


def test_only_a_pass_says_what_it_would_have_caught() -> None:
    for render in (render_text, render_html, render_markdown):
        assert "would have caught" not in render(report("DRIFT"))


def test_weights_that_never_pass_by_are_said_to_be_out_of_reach() -> None:
    result = tpcheck.run(only_a_sum, (2,), backend="sim", sensitivity=True)
    assert result.sensitivity is not None
    assert result.notes[-1].startswith("sensitivity: the subject reads its own weights")


# What is planted, and what counts.


def site(op: str, detail: str, *, magnitude: float = 1.0, floating: bool = True) -> CollectiveSite:
    return CollectiveSite(0, op, detail, "", floating, magnitude)


def kinds(*sites: CollectiveSite) -> list[str]:
    return [fault.plant.kind for fault in collective_faults([Survey(sites, {})] * 2)]


def test_faults_fit_the_collective() -> None:
    assert kinds(site("all_reduce", "sum")) == ["scaled", "missing", "skipped", "doubled"]
    assert kinds(site("all_reduce", "avg")) == ["scaled", "missing", "skipped"]
    assert kinds(site("all_reduce", "max")) == ["skipped"]
    assert kinds(site("all_reduce", "sum", floating=False)) == ["missing", "skipped", "doubled"]
    assert kinds(site("all_gather", "dim=0")) == ["scaled", "swapped"]
    assert kinds(site("broadcast", "src=0")) == []


def test_a_partial_is_scaled_where_there_is_one() -> None:
    surveys = [Survey((site("all_reduce", "sum", magnitude=size),), {}) for size in (0.0, 3.0, 1.0)]
    assert {fault.plant.rank for fault in collective_faults(surveys)} == {1}


def test_nothing_is_planted_where_ranks_call_otherwise() -> None:
    surveys = [Survey((site("all_reduce", "sum"),), {}), Survey((), {})]
    assert collective_faults(surveys) == []


def test_a_weight_is_broken_only_on_a_rank_that_asks_for_it() -> None:
    faults = weight_faults([Survey((), {}), Survey((), {"w": (4, 1)})])
    assert [fault.plant.rank for fault in faults if not fault.probe] == [1, 1, 1]
    assert [(f.plant.kind, f.plant.dim) for f in faults] == [
        ("perturbed", 0),
        ("exchanged", 0),
        ("zeroed", 0),
        ("zeroed", 1),  # one column cannot be exchanged
    ]


def test_what_is_left_out_is_spread_and_probes_stay() -> None:
    faults = [Fault(Plant("x", f"w{i}"), f"w{i}", probe=i % 5 == 0) for i in range(100)]
    kept = spread(faults, 40)
    assert sum(fault.probe for fault in kept) == 20
    assert len(kept) == 40
    others = [int(fault.site[1:]) for fault in kept if not fault.probe]
    assert max(b - a for a, b in pairwise(others)) <= 6
    assert len(spread(faults, 7)) == 7
    assert all(fault.probe for fault in spread(faults, 7))
    assert spread(faults, 1000) == faults


def test_a_site_is_named_once() -> None:
    scaled, zeroed = Plant("scaled", 3, rank=1), Plant("zeroed", "up.weight", rank=1, dim=1)
    missed = [
        Fault(Plant("perturbed", "a.bias"), "a.bias", probe=True),
        Fault(Plant("zeroed", "a.bias"), "a.bias"),
        Fault(zeroed, "up.weight"),
        Fault(scaled, "all_reduce #3 (layers.1.mlp.down_proj)", probe=True),
    ]
    assert blind_to(missed) == [
        "a.bias",
        "all_reduce #3 (layers.1.mlp.down_proj)",
        "up.weight: last column zeroed on rank 1",
    ]
    assert scaled.describe() == "scaled by 1+2^-4 on rank 1"


def test_weight_faults_change_what_they_say() -> None:
    whole = single_group(size=2, rank=1).weight("w", 4, 6)

    def planted(kind: str, dim: int = 0, rank: int = 1) -> torch.Tensor:
        group = single_group(size=2, rank=1)
        Planter(group, Plant(kind, "w", rank, dim))
        return group.weight("w", 4, 6)

    assert torch.equal(planted("exchanged"), torch.cat([whole[2:], whole[:2]]))
    assert torch.equal(planted("exchanged", 1), torch.cat([whole[:, 3:], whole[:, :3]], 1))
    assert torch.equal(planted("exchanged", rank=0), whole)
    assert planted("zeroed")[3].abs().sum() == 0
    assert torch.equal(planted("zeroed")[:3], whole[:3])
    assert planted("zeroed", 1)[:, 5].abs().sum() == 0
    ratio = planted("perturbed", rank=0) / whole - 1
    assert set(ratio.mul(16).round(decimals=6).flatten().tolist()) == {-1.0, 1.0}


def test_generated_named_weights_are_broken_once() -> None:
    group = single_group(size=2)
    Planter(group, Plant("exchanged", "w"))
    group.weights.offer([("w", lambda: group.weights.weight("w", (4, 2)))])
    [(_, tensor)] = group.named_weights()
    whole = single_group(size=2).weight("w", 4, 2)
    assert torch.equal(tensor, torch.cat([whole[2:], whole[:2]]))


def test_planting_leaves_nothing_behind() -> None:
    group = single_group()
    with Planter(group, Plant("doubled", 0)).planted(Plant("doubled", 0), real_ranks=False):
        assert group.interceptor is not None
    assert group.interceptor is None
