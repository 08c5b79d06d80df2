"""Ill-conditioned but clean models, and the bugs that such a model must not excuse.

float64's own rounding is made much of by partials that cancel, and everything of by a chaotic map:
what it comes to is measured on TP=1, and no constant stands in for it.
"""

from __future__ import annotations

import pytest
import torch

import tpcheck

HIDDEN, WIDE, VOCAB = 32, 96, 64


def verdict_of(build, tp_size=4, dtype="float32"):
    [found] = tpcheck.run(build, (tp_size,), dtypes=(dtype,), backend="sim", confirm=False).verdicts
    return found


def cancelling(scale, bug=0.0):
    """Return a layer whose partials are `scale` times their sum; `bug` scales the last one."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        up, down = tp.weight("up", WIDE // 2, HIDDEN), tp.weight("down", HIDDEN, WIDE // 2)
        # The second half takes away what the first gives, but for one part in `scale`.
        up, down = torch.cat([up, up]), torch.cat([down, -down * (1 + 1 / scale)], 1)
        up, down = up.chunk(tp.size)[tp.rank], down.chunk(tp.size, 1)[tp.rank]
        if tp.rank == tp.size - 1 > 0:
            down = down * (1 + bug)
        return lambda input_ids: tp.all_reduce(embed[input_ids] @ up.T @ down.T)

    return build


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e8])
def test_partials_that_cancel_are_held_to_what_float64_leaves_of_them(scale):
    found = verdict_of(cancelling(scale))
    structural = found.checks["structural"]
    assert found.outcome == "PASS", found.reasons
    assert structural.facts["limit"] < 1e-13 * scale
    if structural.facts["relative_rms"] > 1e-12:
        assert "an ulp of float64 at every operation moves TP=1" in structural.facts["source"]


def test_the_floor_is_used_where_no_constant_would_do():
    assert verdict_of(cancelling(1e8)).checks["structural"].facts["relative_rms"] > 1e-12


@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_a_bug_in_a_partial_that_cancels_is_still_one(scale):
    assert verdict_of(cancelling(scale, bug=1e-6)).outcome == "WRONG"


def chaotic(layers, fault=""):
    """Return a model that makes everything of a last bit, layer after layer."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        weights = [tp.weight(f"{i}.down", HIDDEN, HIDDEN) * 4 for i in range(layers)]
        own = [weight.chunk(tp.size, 1)[tp.rank] for weight in weights]

        def forward(input_ids):
            x = embed[input_ids]
            for i, weight in enumerate(own):
                part = x.chunk(tp.size, -1)[tp.rank] @ weight.T
                if fault and i == layers - 1 and tp.rank:
                    part = part * 0
                x = torch.sin(3 * tp.all_reduce(part))
            return x

        return forward

    return build


def test_a_chaotic_model_is_inconclusive_and_says_why():
    found = verdict_of(chaotic(60))
    assert found.outcome == "INCONCLUSIVE"
    assert "an ulp of float64 at every operation moves TP=1's output by" in found.reasons[0]
    assert "could not be told from rounding" in found.reasons[0]


def test_a_few_chaotic_layers_are_still_compared():
    found = verdict_of(chaotic(6))
    assert found.outcome == "PASS"
    assert 1e-12 < found.checks["structural"].facts["limit"] < 1e-6
    assert verdict_of(chaotic(6, fault="reduction")).outcome == "WRONG"


def constants(bias_of):
    """Return a row-parallel layer whose bias every rank adds a share of."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed, bias = tp.weight("embed", VOCAB, HIDDEN), tp.weight("bias", HIDDEN)
        down = tp.weight("down", HIDDEN, WIDE).chunk(tp.size, 1)[tp.rank]
        up = tp.weight("up", WIDE, HIDDEN).chunk(tp.size)[tp.rank]
        return lambda input_ids: tp.all_reduce(embed[input_ids] @ up.T @ down.T + bias_of(tp, bias))

    return build


def test_a_float32_constant_that_no_cast_shows_is_no_bug():
    found = verdict_of(constants(lambda tp, bias: bias * torch.tensor(1 / tp.size)), 3)
    assert found.outcome == "PASS", found.reasons
    assert "constants: with its own float32 constants in float64, TP=N is TP=1" in found.reasons
    assert found.checks["structural"].facts["relative_rms"] < 1e-12


@pytest.mark.parametrize("wrong", [1e-3, 1e-8])
def test_a_constant_that_is_off_is_one(wrong):
    def off(tp, bias):
        return bias * torch.tensor((1 + wrong * (tp.size > 1)) / tp.size, dtype=torch.float64)

    assert verdict_of(constants(off), 3).outcome == "WRONG"


def stepping(decide, bug=0.0):
    """Return a layer that cancels nothing, but takes a step at values that lie on one."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        up = tp.weight("up", WIDE, HIDDEN).chunk(tp.size)[tp.rank]
        down = tp.weight("down", HIDDEN, WIDE).chunk(tp.size, 1)[tp.rank]

        def forward(input_ids):
            x = embed[input_ids]
            x = x + decide(x) * tp.all_reduce(torch.relu(x @ up.T) @ down.T)
            return x * (1 + bug * (tp.size > 1))

        return forward

    return build


STEPS = {
    "an entry is its own threshold": lambda x: (x >= x.kthvalue(5).values[..., None]).to(x.dtype),
    "nothing is left of itself": lambda x: torch.sign(x - x.clone()) + 1,
    "positions are whole": lambda x: torch.floor(torch.arange(x.shape[1]).to(x)[:, None] * 1.0) + 1,
    "a whole number of thirds": lambda x: torch.floor(torch.full_like(x, 3) / 3 * 2),
    "halves of a count": lambda x: torch.remainder(x.new_ones(x.shape).cumsum(-1), 2) + 1,
}


@pytest.mark.parametrize("name", STEPS)
def test_what_steps_excuses_no_bug_far_below_the_step(name):
    assert verdict_of(stepping(STEPS[name])).outcome == "PASS"
    found = verdict_of(stepping(STEPS[name], bug=1e-9))
    assert found.outcome == "WRONG", found.checks["structural"].facts


def leveled(bug=0.0):
    """Return a layer that takes the mean of all tokens away: of one token nothing is left."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        up = tp.weight("up", WIDE, HIDDEN).chunk(tp.size)[tp.rank]
        down = tp.weight("down", HIDDEN, WIDE).chunk(tp.size, 1)[tp.rank]

        def forward(input_ids):
            y = tp.all_reduce(torch.relu(embed[input_ids] @ up.T) @ down.T)
            third = y / 3
            return (y - (third + third + third).mean(1, keepdim=True)) * (1 + bug * (tp.size > 1))

        return forward

    return build


def test_an_input_of_which_only_rounding_is_left_speaks_for_no_other():
    assert verdict_of(leveled()).outcome == "PASS"
    assert verdict_of(leveled(bug=1e-9)).outcome == "WRONG"


def test_a_float64_run_that_is_nan_where_the_deployed_one_is_not_is_no_oracle():
    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        down = tp.weight("down", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]

        def forward(input_ids):
            x, length = embed[input_ids], input_ids.shape[1]
            hidden = torch.ones(length, length).triu(1)
            mask = hidden[:2] * torch.finfo(x.dtype).min  # in a float64 run 0 * inf
            mask = torch.cat([mask, torch.where(hidden[2:] > 0, -1e9, 0.0)]).to(x.dtype)
            scores = (x @ x.mT + mask).softmax(-1)
            part = (scores @ x).chunk(tp.size, -1)[tp.rank] @ down.T
            scale = torch.ones(length, 1, dtype=x.dtype)
            scale[:2] = 1.1 if tp.size > 1 else 1  # where nothing can be compared
            return tp.all_reduce(part) * scale

        return forward

    found = verdict_of(build, 2, "bfloat16")
    assert found.outcome == "INCONCLUSIVE"
    assert "elements that are finite in bfloat16: no oracle of these" in found.reasons[0]
