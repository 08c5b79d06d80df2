"""Probabilities, flips and sequence scores of logits, against torch and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tpcheck.numerics.scores import (
    Flip,
    argmax_flips,
    divergence,
    log_probs,
    sequence_scores,
    top_k_overlap,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_probabilities_are_taken_in_float64_of_the_logits_as_they_are() -> None:
    logits = normal(3, 5).bfloat16()
    found = log_probs(logits)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3).double())
    torch.testing.assert_close(found, logits.double() - logits.double().logsumexp(-1, True))


def test_divergence_is_kl_of_the_first_against_the_second() -> None:
    p, q = log_probs(normal(4, 6)), log_probs(normal(4, 6, seed=1))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(divergence(p, q), expected)
    assert not torch.allclose(divergence(p, q), divergence(q, p))
    assert bool((divergence(p, p) == 0).all())


def test_a_flip_has_tp1s_margin_and_a_tie_has_none() -> None:
    expected = torch.tensor([[1.0, 3.0, 2.5], [2.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    actual = torch.tensor([[1.0, 2.0, 2.5], [1.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    assert argmax_flips(expected, actual) == [Flip(0, 1, 2, 0.5), Flip(1, 0, 1, 0.0)]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_overlap_is_that_of_sets_whatever_their_order(k: int) -> None:
    expected, actual = normal(50, 6), normal(50, 6, seed=1)
    shares = [
        len({*a.topk(k).indices.tolist()} & {*b.topk(k).indices.tolist()}) / k
        for a, b in zip(expected, actual, strict=True)
    ]
    assert top_k_overlap(expected, actual, k) == pytest.approx(sum(shares) / 50)


def test_more_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="k=7, but should be at most the vocabulary, 6"):
        top_k_overlap(normal(1, 6), normal(1, 6), 7)


def test_a_sequence_is_scored_by_the_token_that_follows() -> None:
    logits = torch.zeros(1, 4, 10)
    logits[0, 0, 7], logits[0, 1, 2] = 50.0, 50.0  # sure of 7, then of 2, then of nothing
    found = sequence_scores(logits, torch.tensor([[3, 7, 2, 5]]))
    expected = [0.0, 0.0, -math.log(10)]
    torch.testing.assert_close(found[0].tolist(), expected, rtol=0, atol=1e-9)
