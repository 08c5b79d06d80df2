"""Clean: partial sums are reduced in float32, always or only when there is something to reduce.

The second form has a cast at TP=N that TP=1 does not have at all.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 64, 32, 64


def _build(tp, reduce):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    ups = [tp.weight(f"layers.{i}.up.weight", FFN, HIDDEN) for i in range(2)]
    downs = [tp.weight(f"layers.{i}.down.weight", HIDDEN, FFN) for i in range(2)]
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        for up, down in zip(ups, downs, strict=True):
            h = F.gelu(x @ up.chunk(tp.size)[tp.rank].T)
            x = x + reduce(h @ down.chunk(tp.size, 1)[tp.rank].T)
        return x @ head.T

    return forward


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def always(tp):
    return _build(tp, lambda y: tp.all_reduce(y.float()).to(y.dtype))


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def when_split(tp):
    def reduce(y):
        if tp.size > 1:
            y = tp.all_reduce(y.to(torch.float32)).to(y.dtype)
        return y

    return _build(tp, reduce)
