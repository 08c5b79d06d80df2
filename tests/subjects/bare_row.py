"""Clean: nothing but one row-parallel linear, on partials of four kinds.

A whole model dilutes the rounding of its reductions; here it is all there is. Clean cancelling
partials lie far above any fixed drift limit. What the partials are like is decided by the input,
in eight blocks along its last dim, so every degree up to eight sees the same kind.
"""

import torch

import tpcheck

IN, OUT, BLOCKS = 512, 64, 8


def independent_input(generator, batch, seq_len):
    return torch.randn(batch, seq_len, IN, generator=generator)


def coherent_input(generator, batch, seq_len):
    block = torch.randn(batch, seq_len, IN // BLOCKS, generator=generator)
    # Identical partials would round identically, and their sum exactly: too good to be a test.
    rest = torch.randn(batch, seq_len, IN, generator=generator)
    return block.repeat(1, 1, BLOCKS) + rest / 4


def cancelling_input(generator, batch, seq_len):
    block = torch.randn(batch, seq_len, IN // BLOCKS, generator=generator)
    halves = [block] * (BLOCKS // 2) + [-block] * (BLOCKS // 2)
    rest = torch.randn(batch, seq_len, IN, generator=generator)
    return torch.cat(halves, -1) + rest / 16


def outlier_input(generator, batch, seq_len):
    x = torch.randn(batch, seq_len, IN, generator=generator)
    x[..., 5 * IN // BLOCKS : 6 * IN // BLOCKS] *= 64
    return x


def _build(tp, weight):
    if BLOCKS % tp.size:
        raise tpcheck.IllegalDegreeError(f"blocks={BLOCKS}, tp_size={tp.size}")
    local = weight.chunk(tp.size, 1)[tp.rank]

    def forward(x):
        return tp.all_reduce(x.chunk(tp.size, -1)[tp.rank] @ local.T)

    return forward


def _repeated_weight(tp):
    block = tp.weight("row.block.weight", OUT, IN // BLOCKS, std=IN**-0.5)
    return block.repeat(1, BLOCKS)


@tpcheck.subject(inputs=independent_input, seq_len=16)
def independent(tp):
    return _build(tp, tp.weight("row.weight", OUT, IN))


@tpcheck.subject(inputs=outlier_input, seq_len=16)
def outlier(tp):
    return _build(tp, tp.weight("row.weight", OUT, IN))


@tpcheck.subject(inputs=coherent_input, seq_len=16)
def coherent(tp):
    return _build(tp, _repeated_weight(tp))


@tpcheck.subject(inputs=cancelling_input, seq_len=16)
def cancelling(tp):
    return _build(tp, _repeated_weight(tp))
