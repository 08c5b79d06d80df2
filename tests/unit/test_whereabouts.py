"""An exception of the subject's is told with the input, the degree, and what ran before."""

import pytest
import torch

import tpcheck

torch.set_num_threads(1)


def told(build):
    (found,) = tpcheck.run(build, (2,), backend="sim", confirm=False).verdicts
    assert found.outcome == "ERROR"
    return "\n".join(found.reasons)


def test_what_a_forward_was_given_and_at_which_degree_follows_its_exception():
    @tpcheck.subject(vocab_size=16, seq_len=8)
    def build(tp):
        embed = tp.weight("embed", 16, 4)

        def forward(ids):
            if ids.shape[1] == 3 and tp.size > 1:
                raise ValueError("three")
            return embed[ids]

        return forward

    assert "ValueError: three\ninput t3: int64 [2, 3] [tp 2, float64]" in told(build)


GROUPS = []


@tpcheck.subject(vocab_size=16, seq_len=8)
def initializes_twice(tp):
    if len(GROUPS) == 2:
        raise RuntimeError("already initialized")
    GROUPS.append(tp.size)
    embed = tp.weight("embed", 16, 4)
    return lambda ids: embed[ids]


def test_a_build_that_fails_where_it_ran_before_says_that_it_did():
    text = told(initializes_twice)
    assert "already initialized\nbuild(tp) returned in this process before" in text


@pytest.mark.parametrize("error", [AssertionError("no"), tpcheck.TPCheckError("no")])
def test_a_build_that_never_ran_here_says_nothing_of_before(error):
    @tpcheck.subject(vocab_size=16, seq_len=8)
    def build(tp):
        raise error

    try:
        text = told(build)
    except tpcheck.TPCheckError as raised:
        text = str(raised)
    assert "before" not in text
