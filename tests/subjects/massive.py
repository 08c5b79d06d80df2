"""Clean: a residual stream in which a few channels are thousands of times larger than the rest.

Large models are like this; one rank's partial then holds nearly all the energy of a reduction. All
values stay far below float16's 65504.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN, LAYERS = 96, 64, 64, 2
MASSIVE_CHANNELS = [3, 42]


def rms_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return wide.to(x.dtype) * weight


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    # Powers of two: the stored weights stay exact in every dtype.
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    embed[:, MASSIVE_CHANNELS] *= 1024
    layers = []
    for i in range(LAYERS):
        up = tp.weight(f"layers.{i}.up_proj.weight", FFN, HIDDEN)
        down = tp.weight(f"layers.{i}.down_proj.weight", HIDDEN, FFN)
        down[MASSIVE_CHANNELS] *= 512
        down[MASSIVE_CHANNELS, : FFN // 8] *= 4  # most of it from what becomes the first rank
        norm = tp.weight(f"layers.{i}.norm.weight", HIDDEN)
        layers.append((norm, up.chunk(tp.size)[tp.rank], down.chunk(tp.size, 1)[tp.rank]))
    norm = tp.weight("norm.weight", HIDDEN)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        for weight, up, down in layers:
            x = x + tp.all_reduce(F.silu(rms_norm(x, weight) @ up.T) @ down.T)
        return rms_norm(x, norm) @ head.T

    return forward
