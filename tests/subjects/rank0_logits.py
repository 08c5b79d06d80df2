"""Clean: only rank 0 returns logits, as servers do; the others return None."""

import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 128, 32, 64


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, logits="rank0")
def build(tp):
    if FFN % tp.size or VOCAB % tp.size:
        raise tpcheck.IllegalDegreeError(f"{FFN=}, {VOCAB=}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    up = tp.weight("up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    down = tp.weight("down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN).chunk(tp.size)[tp.rank]

    def forward(input_ids):
        x = embed[input_ids]
        x = x + tp.all_reduce(F.silu(x @ up.T) @ down.T)
        logits = tp.all_gather(x @ head.T, -1)
        return logits if tp.rank == 0 else None

    return forward
