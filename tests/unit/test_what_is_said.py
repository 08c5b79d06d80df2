"""What a run says although nothing failed, or nothing ran: remarks, skips and ways out."""

import os

import pytest
import torch

import tpcheck
from tpcheck.render.content import headline

SHAPES = {"a.w": (8, 8), "b.w": (8,)}


def verdict_of(subject, tp_sizes=(2,), **options):
    return tpcheck.run(subject, tp_sizes, backend="sim", **options).verdicts[-1]


def loading(read):
    @tpcheck.subject(vocab_size=8, seq_len=4, weights=SHAPES)
    def build(tp):
        weights = read(tp)
        return lambda input_ids: weights["a.w"][input_ids]

    return build


@pytest.mark.parametrize(
    ("read", "remark"),
    [
        (lambda tp: dict([next(iter(tp.named_weights()))]), "never reads b.w"),
        (
            lambda tp: {**dict(tp.named_weights()), **dict(tp.named_weights())},
            "reads a.w (2 times), b.w (2 times)",
        ),
    ],
)
def test_named_weights_that_no_degree_reads_once_are_remarked_on(read, remark):
    found = verdict_of(loading(read))
    assert found.outcome == "PASS"
    assert f"weights: of the named ones TP=1 {remark}" in found.reasons


def test_what_rests_on_drift_alone_says_so_and_how_small_a_bug_it_could_have_seen():
    @tpcheck.subject(vocab_size=64, seq_len=9, float64=False)
    def build(tp):
        embed = tp.weight("embed", 64, 32)
        down = tp.weight("down", 32, 32).chunk(tp.size, 1)[tp.rank]
        return lambda ids: tp.all_reduce(embed[ids].chunk(tp.size, -1)[tp.rank] @ down.T)

    report = tpcheck.run(build, (2,), backend="sim")
    [found] = report.verdicts
    smallest = found.checks["drift"].facts["smallest_bug"]
    assert 1e-4 < smallest < 0.1
    said = f"drift alone: what moves the output by less than {smallest:.2g} of it would not show"
    assert found.outcome == "PASS"
    assert said in found.reasons
    assert headline(report).startswith("PASS (drift only); deployed path not exercised")


def test_named_weights_that_are_read_once_are_not():
    found = verdict_of(loading(lambda tp: dict(tp.named_weights())))
    assert not [reason for reason in found.reasons if reason.startswith("weights")]


def test_a_refusal_of_the_subjects_own_names_the_degrees_at_which_it_builds():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        if 6 % tp.size:
            raise tpcheck.IllegalDegreeError(f"heads=6, tp_size={tp.size}")
        embed = tp.weight("embed", 8, 8)
        return lambda input_ids: embed[input_ids]

    found = verdict_of(build, (2, 4))
    assert found.outcome == "ILLEGAL"
    assert found.checks["plan"].reason == (
        "heads=6, tp_size=4\n  tp_size at which it builds: 1, 2, 3, 6"
    )


def test_a_comparison_of_nothing_but_nan_does_not_pass():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 8, 8) * float("nan")
        return lambda input_ids: embed[input_ids]

    found = verdict_of(build)
    assert found.outcome == "INCONCLUSIVE"
    assert found.checks["allclose"].outcome == "SKIPPED"


def test_modules_called_under_vmap_are_no_crash_of_localization():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed, bias = tp.weight("embed", 8, 8), tp.weight("bias", 16).chunk(tp.size)[0]
        up = tp.weight("up", 16, 8).chunk(tp.size)[tp.rank]
        down = tp.weight("down", 8, 16).chunk(tp.size, 1)[tp.rank]
        net = torch.nn.Sequential(torch.nn.Linear(8, 16 // tp.size), torch.nn.GELU())
        held = {"0.weight": up, "0.bias": bias}  # rank 0's biases on every rank

        def forward(input_ids):
            rows = torch.vmap(lambda row: torch.func.functional_call(net, held, (row,)))
            return tp.all_reduce(rows(embed[input_ids]) @ down.T)

        return forward

    assert verdict_of(build, confirm=False).outcome == "WRONG"


def test_the_environment_says_which_attention_and_graphs_may_run():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 8, 8)
        return lambda input_ids: embed[input_ids]

    facts = tpcheck.run(build, (2,), backend="sim").environment
    assert set(facts["sdpa"]) == {"flash", "mem_efficient", "math"}
    assert facts["cuda_graphs"] is False


def test_tensors_beside_the_first_are_said_not_to_be_compared():
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 8, 8)
        return lambda input_ids: (embed[input_ids], embed[input_ids] * tp.size, None)

    report = tpcheck.run(build, (2,), backend="sim")
    assert (
        "forward returns 2 tensors, of which the logits, or the first, were compared"
        in report.notes
    )
    assert report.environment["subject"]["not_compared"] == 1


class Output:
    def __init__(self, logits, aux):
        self.logits, self.aux = logits, aux


@pytest.mark.parametrize("made", [Output, lambda logits, aux: {"aux": aux, "logits": logits}])
def test_tensors_beside_named_logits_are_said_not_to_be_compared(made):
    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 8, 8)
        return lambda input_ids: made(embed[input_ids], embed[input_ids] * tp.size)

    report = tpcheck.run(build, (2,), backend="sim")
    assert "forward returns 2 tensors, of which the logits, or the first, were compared" in (
        report.notes
    )


@pytest.mark.parametrize("given", [{"atol": "a"}, {"rtol": "1"}, {"case": 3}, {"timeout_s": "3"}])
def test_an_option_of_another_type_is_refused_by_name(given):
    [(name, value)] = given.items()
    with pytest.raises(tpcheck.TPCheckError, match=f"{name.removesuffix('_s')}={value!r}, but"):
        tpcheck.run("builtin:llama-tiny", (2,), backend="sim", **given)


def test_a_simulated_rank_that_leaves_the_process_fails_alone():
    leave = os._exit

    @tpcheck.subject(vocab_size=8, seq_len=4)
    def build(tp):
        embed = tp.weight("embed", 8, 8)

        def forward(input_ids):
            if tp.rank == 1:
                os._exit(0)
            return tp.all_reduce(embed[input_ids] / tp.size)

        return forward

    found = verdict_of(build, confirm=False)
    assert found.outcome == "ERROR"
    assert "rank 1 raised SystemExit: 0" in found.reasons[0]
    assert os._exit is leave
