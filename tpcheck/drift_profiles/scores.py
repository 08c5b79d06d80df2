"""The part of a drift profile that speaks of tokens: probabilities, flips, sequences.

Requirement: only a subject that returns logits over its vocabulary has scores; of any other the
profile says so and leaves them out. A token with a logit that is not finite, on either side, has no
probabilities: such tokens are counted and left out.

Shape legend: N tokens, V vocabulary, B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tpcheck.numerics.scores import (
    argmax_flips,
    divergence,
    log_probs,
    sequence_scores,
    top_k_overlap,
)

Json = dict[str, Any]
Outputs = Mapping[str, Tensor]

TOP_K = (1, 5, 20)
MAX_FLIPS = 20
"""Flips shown one by one; all are counted."""


def scores(actual: Outputs, base: Outputs, oracle: Outputs | None) -> Json:
    """Return how TP=N scores tokens against TP=1, over all inputs together.

    Args:
        actual: input id -> logits [..., V] at TP=N.
        base: the same at TP=1.
        oracle: the same in float64; None where there is none.

    Returns:
        `tokens`, `tokens_not_finite`; `log_prob_rms` and `log_prob_max`, over all tokens and the
        whole vocabulary, and `kl_mean` and `kl_max` of KL(TP=1 || TP=N), in nats; `kl_oracle_mean`
        and `tp1_kl_oracle_mean`, KL(oracle || TP=N) and KL(oracle || TP=1), None without an oracle;
        `flips`: `count` and the `first` MAX_FLIPS, each with its input, index, tokens and TP=1's
        margin in logits, and the `largest_margin` of all; `top_k`: k -> mean share of TP=1's k most
        likely tokens that TP=N has too, None where the vocabulary is smaller.
    """
    keys = list(base)
    whole_N = [actual[key].isfinite().all(-1) & base[key].isfinite().all(-1) for key in keys]
    if oracle is not None:
        whole_N = [w & oracle[k].isfinite().all(-1) for w, k in zip(whole_N, keys, strict=True)]
    kept = dict(zip(keys, whole_N, strict=True))
    expected_NV, actual_NV = _rows(base, kept), _rows(actual, kept)
    tokens = len(expected_NV)
    lost = sum(mask.numel() for mask in whole_N) - tokens
    if not tokens:
        return {"tokens": 0, "tokens_not_finite": lost}
    log_p_NV, log_q_NV = log_probs(expected_NV), log_probs(actual_NV)
    moved_NV, kl_N = (log_q_NV - log_p_NV).abs(), divergence(log_p_NV, log_q_NV)
    log_o_NV = None if oracle is None else log_probs(_rows(oracle, kept))
    return {
        "tokens": tokens,
        "tokens_not_finite": lost,
        "log_prob_rms": float(moved_NV.square().mean().sqrt()),
        "log_prob_max": float(moved_NV.max()),
        "kl_mean": float(kl_N.mean()),
        "kl_max": float(kl_N.max()),
        "kl_oracle_mean": None
        if log_o_NV is None
        else float(divergence(log_o_NV, log_q_NV).mean()),
        "tp1_kl_oracle_mean": None
        if log_o_NV is None
        else float(divergence(log_o_NV, log_p_NV).mean()),
        "flips": _flips(expected_NV, actual_NV, _places(kept)),
        "top_k": {
            str(k): top_k_overlap(expected_NV, actual_NV, k) if k <= expected_NV.shape[1] else None
            for k in TOP_K
        },
    }


def sequence_drift(
    actual: Outputs, base: Outputs, oracle: Outputs | None, ids: Mapping[str, Tensor]
) -> Json | None:
    """Return how far sequences' scores drift with their length; None where none can be scored.

    A sequence with a logit that is not finite, on any side, is left out.

    Args:
        actual: input id -> logits [B, T, V] at TP=N.
        base: the same at TP=1.
        oracle: the same in float64; None where there is none.
        ids: input id -> token ids [B, T].

    Returns:
        `sequences`; `lengths`: predicted tokens 1, 2, 4, ... and the most; at each of them, in
        nats of the sequence's log-probability: `mean` and `max` of |TP=N - TP=1|, and `tp1_mean` of
        |TP=1 - oracle|, None without an oracle.
    """
    drifts, own = [], []
    for key, ids_BT in ids.items():
        runs = [outputs[key] for outputs in (actual, base, oracle or {}) if key in outputs]
        fits = all(run.shape[:2] == ids_BT.shape for run in runs) and ids_BT.shape[1] > 1
        if len(runs) < (2 if oracle is None else 3) or not fits:
            continue
        kept_B = torch.stack([run.isfinite().flatten(1).all(1) for run in runs]).all(0)
        at_n, at_1, *exact = (sequence_scores(run[kept_B], ids_BT[kept_B]) for run in runs)
        drifts.append((at_n - at_1).abs())
        own += [(at_1 - one).abs() for one in exact]
    drifts = [drift for drift in drifts if len(drift)]
    own = [one for one in own if len(one)]
    if not drifts:
        return None
    drift_Bn = torch.cat(drifts)
    lengths = _lengths(drift_Bn.shape[1])
    at = [length - 1 for length in lengths]
    return {
        "sequences": len(drift_Bn),
        "lengths": lengths,
        "mean": drift_Bn.mean(0)[at].tolist(),
        "max": drift_Bn.amax(0)[at].tolist(),
        "tp1_mean": torch.cat(own).mean(0)[at].tolist() if own else None,
    }


def _rows(outputs: Outputs, kept: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([outputs[key][mask] for key, mask in kept.items()])


def _places(kept: Mapping[str, Tensor]) -> list[tuple[str, list[int]]]:
    return [(key, at) for key, mask in kept.items() for at in mask.nonzero().tolist()]


def _flips(expected_NV: Tensor, actual_NV: Tensor, places: list[tuple[str, list[int]]]) -> Json:
    flips = argmax_flips(expected_NV, actual_NV)
    shown = [
        {
            "input": places[flip.index][0],
            "index": places[flip.index][1],
            "tp1_token": flip.expected,
            "token": flip.actual,
            "tp1_margin": flip.margin,
        }
        for flip in flips[:MAX_FLIPS]
    ]
    largest = max((flip.margin for flip in flips), default=None)
    return {"count": len(flips), "first": shown, "largest_margin": largest}


def _lengths(longest: int) -> list[int]:
    powers = [2**i for i in range(longest.bit_length()) if 2**i < longest]
    return [*powers, longest]
