"""Subjects for drift: one plain MLP, the same with massive activations, and one that sums alone."""

from __future__ import annotations

import torch
import torch.distributed._functional_collectives as functional

import tpcheck
from tests.subjects import bare_row

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


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_async_calls(tp):
    def total(partial):
        summed = partial.clone()
        handle = torch.distributed.all_reduce(summed, group=tp.process_group, async_op=True)
        handle.wait()
        return summed

    return _model(tp, 1.0, total)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_functional_calls(tp):
    return _model(tp, 1.0, lambda x: functional.all_reduce(x, "sum", tp.process_group))


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_scattered_calls(tp):
    """Sum pieces, then gather them, padded to a piece per rank."""

    def total(partial):
        flat = partial.flatten()
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % tp.size))
        mine, whole = padded.new_empty(padded.numel() // tp.size), torch.empty_like(padded)
        torch.distributed.reduce_scatter_tensor(mine, padded, group=tp.process_group)
        torch.distributed.all_gather_into_tensor(whole, mine, group=tp.process_group)
        return whole[: flat.numel()].view_as(partial)

    return _model(tp, 1.0, total)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_pieces_with_the_operand(tp):
    """Sum as Megatron gathers: the operand is one of the pieces that are written."""

    def total(partial):
        if tp.size == 1:
            return partial
        pieces = [torch.empty_like(partial) for _ in range(tp.size)]
        pieces[tp.rank] = partial
        torch.distributed.all_gather(pieces, partial, group=tp.process_group)
        summed = sum(pieces[1:], start=pieces[0].clone()) - partial
        torch.distributed.all_reduce(partial, group=tp.process_group)
        return torch.where(summed.isfinite(), partial, summed)

    return _model(tp, 1.0, total)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_groups(tp):
    """Sum over pairs of ranks, then over the pairs: groups of the subject's own."""
    size = tp.size
    pairs = [[i, i + 1] for i in range(0, size, 2)] + [[i, i + size // 2] for i in range(size // 2)]
    made = [torch.distributed.new_group(ranks) for ranks in pairs] if size == 4 else []
    own = [made[i] for i, ranks in enumerate(pairs) if made and tp.rank in ranks]

    def total(partial):
        summed = partial.clone()
        for group in own or [tp.process_group]:
            torch.distributed.all_reduce(summed, group=group)
        return summed

    return _model(tp, 1.0, total)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_coalesced_calls(tp):
    return _model(tp, 1.0, lambda partial: _coalesced(tp, partial))


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def own_reduce_and_broadcast(tp):
    def total(partial):
        summed = partial.clone()
        torch.distributed.reduce(summed, 0, group=tp.process_group)
        torch.distributed.broadcast(summed, 0, group=tp.process_group)
        return summed

    return _model(tp, 1.0, total)


def _coalesced(tp, partial):
    halves = [half.contiguous() for half in partial.chunk(2, -1)]
    if tp.size > 1:
        with torch.distributed._coalescing_manager(tp.process_group):
            for half in halves:
                torch.distributed.all_reduce(half, group=tp.process_group)
    return torch.cat(halves, -1)


def _cancelling(tp, total):
    block = tp.weight("row.block.weight", bare_row.OUT, bare_row.IN // bare_row.BLOCKS)
    local = block.repeat(1, bare_row.BLOCKS).chunk(tp.size, 1)[tp.rank]
    return lambda x: total(x.chunk(tp.size, -1)[tp.rank] @ local.T)


@tpcheck.subject(inputs=bare_row.cancelling_input, seq_len=16)
def own_cancelling(tp):
    """Partials that nearly cancel, summed by torch.distributed, with nothing to dilute it."""

    def total(partial):
        torch.distributed.all_reduce(partial, group=tp.process_group)
        return partial

    return _cancelling(tp, total)


@tpcheck.subject(inputs=bare_row.cancelling_input, seq_len=16)
def own_cancelling_coalesced(tp):
    return _cancelling(tp, lambda partial: _coalesced(tp, partial))


@tpcheck.subject(inputs=lambda generator: torch.randn(6, HIDDEN, generator=generator))
def layer(tp):
    """Return a bare row-parallel layer: no logits, no tokens."""
    down = tp.weight("down", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]
    return lambda x: tp.all_reduce(x.chunk(tp.size, 1)[tp.rank] @ down.T)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, float64=False)
def narrow_only(tp):
    return _model(tp, 1.0, tp.all_reduce)
