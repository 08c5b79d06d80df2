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
