"""Clean, but parts of it cannot show a bug: what sensitivity has to name.

A branch that is multiplied by zero with a reduction in it, a bias that softmax cancels, a weight
that is asked for and never read. Everything else is a plain column- and row-parallel block.
"""

import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 64, 32, 64


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    up = tp.weight("mlp.up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    down = tp.weight("mlp.down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    dead = tp.weight("adapter.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    shift = tp.weight("score.bias", 1)
    tp.weight("rotary.inv_freq", 4)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        h = F.gelu(x @ up.T)
        x = x + tp.all_reduce(h @ down.T)
        x = x + 0.0 * tp.all_reduce(h @ dead.T)
        x = x * (x + shift).softmax(-1)
        return x @ head.T

    return forward
