"""Clean: embedding and head are split over a padded vocabulary; a norm spans the sharded dim.

The norm's sum of squares crosses the ranks in float32. No pad row may reach a logit.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN = 99, 32, 64


def padded_rows(weight, tp):
    """This rank's rows of `weight`, after adding zero rows until they divide."""
    padded = F.pad(weight, (0, 0, 0, -VOCAB % tp.size))
    return padded.chunk(tp.size)[tp.rank]


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    embed = padded_rows(tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0), tp)
    head = padded_rows(tp.weight("lm_head.weight", VOCAB, HIDDEN), tp)
    up = tp.weight("up.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    norm = tp.weight("norm.weight", FFN).chunk(tp.size)[tp.rank]
    down = tp.weight("down.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]
    first = tp.rank * embed.shape[0]

    def lookup(input_ids):
        local = input_ids - first
        mine = (local >= 0) & (local < embed.shape[0])
        rows = embed[local.where(mine, torch.zeros_like(local))]
        return tp.all_reduce(rows * mine.unsqueeze(-1))

    def norm_across_ranks(h):
        squares = h.float().pow(2).sum(-1, keepdim=True)
        mean = tp.all_reduce(squares) / FFN
        return (h.float() * torch.rsqrt(mean + 1e-6)).to(h.dtype) * norm

    def forward(input_ids):
        x = lookup(input_ids)
        x = x + tp.all_reduce(F.gelu(norm_across_ranks(x @ up.T)) @ down.T)
        return tp.all_gather(x @ head.T, -1)[..., :VOCAB]

    return forward
