"""Subjects for drift: one plain MLP, the same with massive activations, and one that sums alone."""

from __future__ import annotations

import torch

import tpcheck

VOCAB, HIDDEN, FEATURES = 131, 64, 256
MASSIVE = 2.0**17
"""Partials and activations then reach 3e5, as gpt-oss's do (sgl-project/sglang#34473)."""


def _model(tp, scale, total):
    embed = tp.weight("embed", VOCAB, HIDDEN)
    up = tp.weight("up", FEATURES, HIDDEN).chunk(tp.size, 0)[tp.rank]
    down = (tp.weight("down", HIDDEN, FEATURES) * scale).chunk(tp.size, 1)[tp.rank]
    head = tp.weight("head", VOCAB, HIDDEN)

    def forward(ids):
        x = embed[ids]
        y = x + total(torch.relu(x @ up.T * 8) @ down.T)
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        size = wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(size + 1e-6)).to(y.dtype) @ head.T

    return forward


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def plain(tp):
    return _model(tp, 1.0, tp.all_reduce)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def massive(tp):
    return _model(tp, MASSIVE, tp.all_reduce)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_calls(tp):
    def total(partial):
        summed = partial.clone()
        torch.distributed.all_reduce(summed, group=tp.process_group)
        return summed

    return _model(tp, 1.0, total)


@tpcheck.subject(inputs=lambda generator: torch.randn(6, HIDDEN, generator=generator))
def layer(tp):
    """Return a bare row-parallel layer: no logits, no tokens."""
    down = tp.weight("down", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]
    return lambda x: tp.all_reduce(x.chunk(tp.size, 1)[tp.rank] @ down.T)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, float64=False)
def narrow_only(tp):
    return _model(tp, 1.0, tp.all_reduce)
