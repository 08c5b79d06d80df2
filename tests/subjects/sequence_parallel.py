"""Clean: between the linears every rank holds a slice of the tokens (sequence parallelism).

Token counts that do not divide are padded before they are split, and the pad is cut off at the end.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN, LAYERS = 96, 32, 64, 2


def layer_norm(x, weight, bias):
    return F.layer_norm(x, (HIDDEN,), weight, bias)


@tpcheck.subject(vocab_size=VOCAB, seq_len=13)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)
    layers = [
        (
            tp.weight(f"layers.{i}.norm.weight", HIDDEN),
            tp.weight(f"layers.{i}.norm.bias", HIDDEN),
            tp.weight(f"layers.{i}.up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank],
            tp.weight(f"layers.{i}.up.bias", FFN).chunk(tp.size)[tp.rank],
            tp.weight(f"layers.{i}.down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank],
            tp.weight(f"layers.{i}.down.bias", HIDDEN),
        )
        for i in range(LAYERS)
    ]

    def forward(input_ids):
        length = input_ids.shape[1]
        padded = torch.nn.functional.pad(input_ids, (0, -length % tp.size))
        x = embed[padded.chunk(tp.size, 1)[tp.rank]]
        for weight, bias, up, up_bias, down, down_bias in layers:
            h = tp.all_gather(layer_norm(x, weight, bias), 1)
            h = F.gelu(F.linear(h, up, up_bias))
            x = x + tp.reduce_scatter(h @ down.T, 1) + down_bias
        return tp.all_gather(x, 1)[:, :length] @ head.T

    return forward
