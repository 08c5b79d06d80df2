"""Clean: a top-2 mixture of eight experts, split inside every expert or expert by expert.

The router is replicated, its softmax in float32; one all_reduce per layer sums the experts.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN, EXPERTS, TOP_K = 96, 32, 32, 8, 2


def _build(tp, gates, ups, downs, first):
    """`first`: the number of the first expert in the lists."""
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    router = tp.weight("mlp.gate.weight", EXPERTS, HIDDEN)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def experts(x):
        scores = F.softmax(x @ router.T, -1, dtype=torch.float32)
        weights, chosen = scores.topk(TOP_K, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(x)
        for i, (gate, up, down) in enumerate(zip(gates, ups, downs, strict=True), start=first):
            share = (weights * (chosen == i)).sum(-1, keepdim=True)
            y = y + share * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return tp.all_reduce(y)

    def forward(input_ids):
        x = embed[input_ids]
        return (x + experts(x)) @ head.T

    return forward


def _expert(tp, i):
    return (
        tp.weight(f"mlp.experts.{i}.gate_proj.weight", FFN, HIDDEN),
        tp.weight(f"mlp.experts.{i}.up_proj.weight", FFN, HIDDEN),
        tp.weight(f"mlp.experts.{i}.down_proj.weight", HIDDEN, FFN),
    )


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def expert_tp(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"moe_intermediate_size={FFN}, tp_size={tp.size}")
    gates, ups, downs = zip(*(_expert(tp, i) for i in range(EXPERTS)), strict=True)
    return _build(
        tp,
        [w.chunk(tp.size)[tp.rank] for w in gates],
        [w.chunk(tp.size)[tp.rank] for w in ups],
        [w.chunk(tp.size, 1)[tp.rank] for w in downs],
        first=0,
    )


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def expert_parallel(tp):
    if EXPERTS % tp.size:
        raise tpcheck.IllegalDegreeError(f"num_experts={EXPERTS}, tp_size={tp.size}")
    mine = EXPERTS // tp.size
    first = tp.rank * mine
    gates, ups, downs = zip(*(_expert(tp, first + i) for i in range(mine)), strict=True)
    return _build(tp, gates, ups, downs, first)
