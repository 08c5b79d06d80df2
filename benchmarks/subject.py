"""The fixed case of the throughput benchmark: a 2-layer decoder with exactly four all-reduces.

Embedding and head are whole on every rank; attention and MLP are column-then-row pairs. Sizes come
from the environment, so that the same module serves the full and the tiny case on every backend.
"""

import os

from torch.nn import functional

import tpcheck

HIDDEN = int(os.environ.get("BENCH_HIDDEN", "256"))
WIDE = "BENCH_WIDE" in os.environ
"""64 heads and an FFN that 64 divides, for how simulation grows with the degree."""
FFN = 704 if WIDE else {256: 688, 64: 176}[HIDDEN]
VOCAB, SEQ_LEN, LAYERS, HEADS = 512, 16, 2, 64 if WIDE else 8


def norm(x):
    return functional.rms_norm(x, x.shape[-1:])


@tpcheck.subject(vocab_size=VOCAB, seq_len=SEQ_LEN, sweep=False)
def build(tp):
    def column(name, rows):
        return tp.weight(name, rows, HIDDEN).chunk(tp.size, 0)[tp.rank]

    def row(name, columns):
        return tp.weight(name, HIDDEN, columns).chunk(tp.size, 1)[tp.rank]

    embed, head = tp.weight("embed", VOCAB, HIDDEN), tp.weight("head", VOCAB, HIDDEN)
    layers = [
        (
            [column(f"{i}.{name}", HIDDEN) for name in "qkv"],
            row(f"{i}.o", HIDDEN),
            [column(f"{i}.{name}", FFN) for name in ("gate", "up")],
            row(f"{i}.down", FFN),
        )
        for i in range(LAYERS)
    ]

    def forward(input_ids):
        x = embed[input_ids]
        for qkv, o, (gate, up), down in layers:
            h = norm(x)
            q, k, v = ((h @ w.T).unflatten(-1, (HEADS // tp.size, -1)).transpose(1, 2) for w in qkv)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + tp.all_reduce(y.transpose(1, 2).flatten(2) @ o.T)
            h = norm(x)
            x = x + tp.all_reduce((functional.silu(h @ gate.T) * (h @ up.T)) @ down.T)
        return norm(x) @ head.T

    return forward
