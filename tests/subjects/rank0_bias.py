"""Clean: the row-parallel bias is added on rank 0 only, before the all_reduce (as nano-vllm does).

It looks like the classic bug, a bias inside the sum, and is right.
"""

import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 96, 32, 64


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    up = tp.weight("up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    up_bias = tp.weight("up.bias", FFN).chunk(tp.size)[tp.rank]
    down = tp.weight("down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    down_bias = tp.weight("down.bias", HIDDEN)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        h = F.silu(F.linear(x, up, up_bias))
        y = tp.all_reduce(F.linear(h, down, down_bias if tp.rank == 0 else None))
        return (x + y) @ head.T

    return forward
