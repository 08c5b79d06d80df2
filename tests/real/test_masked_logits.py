"""Logits that a model masks are compared beside what it masks them with, which is far larger."""

from typing import Any

import pytest
import torch

import tpcheck

torch.set_num_threads(1)


@pytest.mark.parametrize(("reduced", "outcome"), [(True, "PASS"), (False, "WRONG")])
@pytest.mark.parametrize("cast", [None, torch.float32])
@pytest.mark.parametrize("mask", [None, -1e9, -1e30])
def test_a_mask_hides_no_other_logit(reduced: bool, outcome: str, cast: Any, mask: Any) -> None:
    @tpcheck.subject(vocab_size=32, seq_len=4)
    def build(tp: tpcheck.TPGroup) -> Any:
        embed = tp.weight("embed", 32, 16)
        up = tp.weight("up", 32, 16).chunk(tp.size, 0)[tp.rank]
        down = tp.weight("down", 16, 32).chunk(tp.size, 1)[tp.rank]

        def forward(ids: torch.Tensor) -> torch.Tensor:
            x = embed[ids]
            partial = torch.relu(x @ up.T) @ down.T
            logits = (x + (tp.all_reduce(partial) if reduced else partial)) @ embed.T
            logits[..., 30:] = torch.finfo(logits.dtype).min if mask is None else mask
            return logits if cast is None or logits.dtype == torch.float64 else logits.to(cast)

        return forward

    assert tpcheck.run(build, (2,), backend="sim", confirm=False).outcome == outcome


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_token_that_rounding_filters_out_is_no_overflow(dtype):
    """Top-p: a token at the edge of the nucleus falls out of it in one dtype, at TP=1 as well."""

    @tpcheck.subject(vocab_size=96, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", 96, 32, std=1.0)
        head = tp.weight("head", 96, 32).chunk(tp.size)[tp.rank]
        down = tp.weight("down", 32, 32).chunk(tp.size, 1)[tp.rank]

        def forward(input_ids):
            x = embed[input_ids]
            x = x + tp.all_reduce(torch.relu(x).chunk(tp.size, -1)[tp.rank] @ down.T)
            logits, at = tp.all_gather(x @ head.T, -1).sort(-1, descending=True)
            chances = logits.softmax(-1)
            logits = logits.masked_fill(chances.cumsum(-1) - chances > 0.9, -torch.inf)
            return torch.full_like(logits, -torch.inf).scatter(-1, at, logits)

        return forward

    report = tpcheck.run(build, (2, 4, 8), dtypes=(dtype,), backend="sim", confirm=False)
    assert [verdict.outcome for verdict in report.verdicts] == ["PASS"] * 3
