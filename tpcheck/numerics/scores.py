"""What rounding does to scores: probabilities, the token that wins, a sequence's likelihood.

Requirement: an error in logits means nothing to who serves a model; a flipped token, a divergence
and a sequence's score do. Every number is of TP=1 against TP=N, in float64 from the logits as they
are, and a flip is shown with the margin it had: at margin 0 it is a tie, not a bug.

Shape legend: N tokens, V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Flip:
    """A token whose most likely successor is another at TP=N; `margin`: TP=1's first over second,
    in logits."""

    index: int
    expected: int
    actual: int
    margin: float


def log_probs(logits: Tensor) -> Tensor:
    """Return the log-probabilities over the last dim, in float64.

    Source: the definition of softmax.
    """
    return torch.log_softmax(logits.double(), -1)


def divergence(expected_NV: Tensor, actual_NV: Tensor) -> Tensor:
    """Return KL(expected || actual) of each token [N], in nats, never below 0.

    Args:
        expected_NV: log-probabilities.
        actual_NV: log-probabilities.

    Source: Kullback & Leibler 1951.
    """
    terms_NV = expected_NV.exp() * (expected_NV - actual_NV)
    return terms_NV.sum(-1).clamp_min(0.0)


def argmax_flips(expected_NV: Tensor, actual_NV: Tensor) -> list[Flip]:
    """Return the tokens whose largest logit is another one, in order.

    Source: the definition.
    """
    expected_N, actual_N = expected_NV.argmax(-1), actual_NV.argmax(-1)
    at = (expected_N != actual_N).nonzero().flatten().tolist()
    return [
        Flip(i, int(expected_N[i]), int(actual_N[i]), _margin(expected_NV[i].double())) for i in at
    ]


def top_k_overlap(expected_NV: Tensor, actual_NV: Tensor, k: int) -> float:
    """Return the mean share of the k most likely tokens that are the same ones.

    Raises:
        ValueError: there are fewer than k.

    Source: the definition.
    """
    if k > expected_NV.shape[-1]:
        raise ValueError(f"k={k}, but should be at most the vocabulary, {expected_NV.shape[-1]}")
    expected_Nk, actual_Nk = expected_NV.topk(k).indices, actual_NV.topk(k).indices
    same_Nkk = expected_Nk.unsqueeze(-1) == actual_Nk.unsqueeze(-2)
    return float(same_Nkk.any(-1).double().mean())


def sequence_scores(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the log-probability of each sequence's tokens after the first, summed up [B, T - 1].

    Teacher-forced: column n - 1 is the score of the first n tokens that were predicted.

    Source: the chain rule; log p(id of t + 1 | ids up to t) summed over t.
    """
    each_BT = log_probs(logits_BTV[:, :-1]).gather(-1, ids_BT[:, 1:].unsqueeze(-1)).squeeze(-1)
    return each_BT.cumsum(-1)


def _margin(logits_V: Tensor) -> float:
    if logits_V.numel() < 2:
        return 0.0
    first, second = logits_V.topk(2).values
    return float(first - second)
