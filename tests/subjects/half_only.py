"""Clean: a subject that runs in half precision only, as fixed-dtype kernels do (float64=False).

Only drift can judge it, so the report has to say which bugs it could not have seen.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 96, 32, 64


def kernel(x, up, down):
    assert x.dtype in (torch.bfloat16, torch.float16), f"no kernel for {x.dtype}"
    return F.silu(x @ up.T) @ down.T


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, float64=False)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    up = tp.weight("up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    down = tp.weight("down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        return (x + tp.all_reduce(kernel(x, up, down))) @ head.T

    return forward
