"""Clean: a Llama block whose norm, rope and softmax are in float32 whatever dtype was asked for.

A float64 run of it is only as exact as float32 at those casts, which must not look like a bug.
"""

import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 96, 64, 128, 8, 4, 8


def rms_norm(x, weight):
    dtype = x.dtype
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x.to(dtype)


def rope(x):
    half = HEAD_DIM // 2
    frequency = 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention:
    def __init__(self, tp, name):
        if HEADS % tp.size:
            raise tpcheck.IllegalDegreeError(f"num_attention_heads={HEADS}, tp_size={tp.size}")
        self.tp, self.heads = tp, HEADS // tp.size
        # With more ranks than KV heads, neighbours hold a copy of the same one.
        self.kv_heads = max(1, KV_HEADS // tp.size)
        first = tp.rank * KV_HEADS // tp.size
        kv = slice(first * HEAD_DIM, (first + self.kv_heads) * HEAD_DIM)
        q = slice(
            tp.rank * self.heads * HEAD_DIM,
            (tp.rank + 1) * self.heads * HEAD_DIM,
        )
        self.q = tp.weight(f"{name}.q_proj.weight", HEADS * HEAD_DIM, HIDDEN)[q]
        self.k = tp.weight(f"{name}.k_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)[kv]
        self.v = tp.weight(f"{name}.v_proj.weight", KV_HEADS * HEAD_DIM, HIDDEN)[kv]
        self.o = tp.weight(f"{name}.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)[:, q]

    def __call__(self, x):
        batch, length, _ = x.shape
        q = (x @ self.q.T).view(batch, length, self.heads, HEAD_DIM).transpose(1, 2)
        k = (x @ self.k.T).view(batch, length, self.kv_heads, HEAD_DIM).transpose(1, 2)
        v = (x @ self.v.T).view(batch, length, self.kv_heads, HEAD_DIM).transpose(1, 2)
        group = self.heads // self.kv_heads
        q, k = rope(q), rope(k).repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) / HEAD_DIM**0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
        y = (weights.to(v.dtype) @ v).transpose(1, 2).reshape(batch, length, -1)
        return self.tp.all_reduce(y @ self.o.T)


class MLP:
    def __init__(self, tp, name):
        if FFN % tp.size:
            raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
        self.tp = tp
        self.gate = tp.weight(f"{name}.gate_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.up = tp.weight(f"{name}.up_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.down = tp.weight(f"{name}.down_proj.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]

    def __call__(self, x):
        return self.tp.all_reduce((F.silu(x @ self.gate.T) * (x @ self.up.T)) @ self.down.T)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    head = tp.weight("lm_head.weight", VOCAB, HIDDEN)
    layers = [
        (
            tp.weight(f"layers.{i}.input_layernorm.weight", HIDDEN),
            Attention(tp, f"layers.{i}.self_attn"),
            tp.weight(f"layers.{i}.post_attention_layernorm.weight", HIDDEN),
            MLP(tp, f"layers.{i}.mlp"),
        )
        for i in range(2)
    ]
    norm = tp.weight("norm.weight", HIDDEN)

    def forward(input_ids):
        x = embed[input_ids]
        for norm1, attention, norm2, mlp in layers:
            x = x + attention(rms_norm(x, norm1))
            x = x + mlp(rms_norm(x, norm2))
        return rms_norm(x, norm) @ head.T

    return forward
