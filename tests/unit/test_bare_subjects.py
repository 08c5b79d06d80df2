"""Subjects without any module: a failure is located at their collectives, by line and rank."""

from __future__ import annotations

import inspect

import pytest
import torch

import tpcheck

VOCAB, HIDDEN, FFN, LAYERS = 64, 32, 72, 3


def weights(tp):
    embed = tp.weight("embed", VOCAB, HIDDEN)
    layers = [
        (
            tp.weight(f"{i}.up", FFN, HIDDEN).chunk(tp.size)[tp.rank],
            tp.weight(f"{i}.down", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank],
        )
        for i in range(LAYERS)
    ]
    return embed, layers


def stack(tp, plant):
    """Return `LAYERS` row-parallel layers; `plant(tp, layer, term, total)` spoils their sums."""
    embed, layers = weights(tp)

    def forward(input_ids):
        x = embed[input_ids]
        for i, (up, down) in enumerate(layers):
            term = torch.relu(x @ up.T) @ down.T
            before, after = plant(tp, i)
            x = x + tp.all_reduce(before * term) * after  # the line
        return x

    return forward


LINE = next(
    number
    for number, text in enumerate(
        inspect.getsourcelines(stack)[0], inspect.getsourcelines(stack)[1]
    )
    if "# the line" in text
)
CALL = f"all_reduce at test_bare_subjects.py:{LINE}"


def verdict_of(build, tp_size=3, **options):
    built = tpcheck.subject(vocab_size=VOCAB, seq_len=9)(build)
    report = tpcheck.run(built, (tp_size,), backend="sim", confirm=False, **options)
    return report.verdicts[0]


@pytest.mark.parametrize(("layer", "suffix"), [(0, ""), (1, "#2"), (2, "#3")])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_term_that_is_off_is_named_by_call_rank_and_factor(layer, suffix, rank):
    def plant(tp, i):
        return (1.25 if (i, tp.rank) == (layer, rank) and tp.size > 1 else 1, 1)

    found = verdict_of(lambda tp: stack(tp, plant))
    assert found.outcome == "WRONG"
    assert (found.first_divergence.fqn, found.first_divergence.rank) == (CALL + suffix, rank)
    assert f"rank {rank}'s partial is off by a factor of 1.25" in found.first_divergence.detail


def test_the_rank_is_named_in_the_deployed_dtype_too():
    def plant(tp, i):
        return (1.25 if (i, tp.rank) == (1, 2) else 1, 1)

    built = tpcheck.subject(vocab_size=VOCAB, seq_len=9, float64=False)
    report = tpcheck.run(built(lambda tp: stack(tp, plant)), (3,), backend="sim", confirm=False)
    [found] = report.verdicts
    assert found.outcome == "DRIFT"
    assert (found.first_divergence.fqn, found.first_divergence.rank) == (CALL + "#2", 2)


def test_what_is_off_behind_the_last_collective_says_so():
    found = verdict_of(
        lambda tp: stack(tp, lambda tp, i: (1, 1.5 if i == 2 and tp.size > 1 else 1))
    )
    assert found.outcome == "WRONG"
    assert found.first_divergence is None
    said = (
        f"every collective gives what it does at TP=1: look at what comes after the last, {CALL}#3"
    )
    assert f"localization: {said}" in found.reasons


def test_a_call_that_only_tp1_makes_is_named():
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        down = tp.weight("down", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]

        def forward(input_ids):
            term = embed[input_ids].chunk(tp.size, -1)[tp.rank] @ down.T
            return term if tp.size > 1 else tp.all_reduce(term)

        return forward

    found = verdict_of(build, 2)
    assert found.outcome == "WRONG"
    said = [reason for reason in found.reasons if reason.startswith("localization: ")]
    assert len(said) == 1
    assert said[0].startswith("localization: TP=1 calls all_reduce at test_bare_subjects.py:")
    assert said[0].endswith(", TP=2 does not")


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_gather_in_the_wrong_order_is_named(tp_size):
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        wrong = (tp.rank + 1) % tp.size
        rows = tp.weight("rows", FFN, HIDDEN).chunk(tp.size)[wrong]
        return lambda input_ids: tp.all_gather(embed[input_ids] @ rows.T, 2)

    found = verdict_of(build, tp_size)
    assert found.outcome == "WRONG"
    assert found.first_divergence.fqn.startswith("all_gather at test_bare_subjects.py:")


def padded_stack(tp, layer):
    """Return a sequence-parallel stack; the last rank's term of one layer is off."""
    embed, layers = weights(tp)

    def forward(input_ids):
        tokens = input_ids.shape[1]
        own = -(-tokens // tp.size)
        x = torch.nn.functional.pad(embed[input_ids], (0, 0, 0, own * tp.size - tokens))
        x = x[:, tp.rank * own : (tp.rank + 1) * own]
        for i, (up, down) in enumerate(layers):
            term = torch.relu(tp.all_gather(x, 1) @ up.T) @ down.T
            off = (i, tp.rank, tp.size > 1) == (layer, tp.size - 1, True)
            x = x + tp.reduce_scatter(term * (1 + 2**-7 if off else 1), 1)
        return tp.all_gather(x, 1)[:, :tokens]

    return forward


@pytest.mark.parametrize(("layer", "suffix"), [(0, ""), (1, "#2"), (2, "#3")])
@pytest.mark.parametrize("tp_size", [2, 4])
def test_pads_of_sequence_parallel_tokens_hide_no_place(layer, suffix, tp_size):
    found = verdict_of(lambda tp: padded_stack(tp, layer), tp_size)  # 9 tokens divide by neither
    first = found.first_divergence
    assert first.fqn.startswith("reduce_scatter at test_bare_subjects.py:")
    assert first.fqn.partition("#")[2] == suffix.removeprefix("#")
    assert first.rank == tp_size - 1
    assert f"rank {tp_size - 1}'s partial is off by a factor of 1.00781" in first.detail
    assert "shape=" not in first.detail


def test_who_receives_what_is_off_is_not_blamed_for_it():
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)

        def forward(input_ids):
            own = -(-input_ids.shape[1] // tp.size)
            pads = own * tp.size - input_ids.shape[1]
            x = torch.nn.functional.pad(embed[input_ids], (0, 0, 0, pads))
            x = x[:, tp.rank * own : (tp.rank + 1) * own]
            heads = tp.all_to_all(x.unflatten(-1, (4, -1)), 2, 1).cumsum(1)
            if tp.size > 1 and tp.rank == 0:  # of the last token, which the last rank gets back
                heads[:, input_ids.shape[1] - 1] *= 1.5
            y = tp.all_to_all(heads, 1, 2).flatten(2)
            return tp.all_gather(y, 1)[:, : input_ids.shape[1]]

        return forward

    first = verdict_of(build, 4, seq_len=8).first_divergence
    assert first.fqn.startswith("all_to_all at test_bare_subjects.py:")
    assert (first.rank, first.index) == (None, "[0:2, 7, 0, 0:8]")


def test_a_subject_that_shows_nothing_is_told_what_to_show():
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        return lambda input_ids: embed[input_ids] * tp.size

    found = verdict_of(build)
    assert found.first_divergence is None
    said = "localization: TP=1 has neither modules nor collectives of tp"
    assert any(reason.startswith(said) for reason in found.reasons)
