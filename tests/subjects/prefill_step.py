"""Clean: attention with a key/value cache, split by heads; the state is passed in and out."""

import torch

import tpcheck

VOCAB, HIDDEN, HEADS, HEAD_DIM, LONGEST = 96, 64, 8, 8, 16


class Model:
    def __init__(self, tp):
        if HEADS % tp.size:
            raise tpcheck.IllegalDegreeError(f"num_attention_heads={HEADS}, tp_size={tp.size}")
        self.tp, self.heads = tp, HEADS // tp.size
        self.embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
        self.positions = tp.weight("embed_positions.weight", LONGEST, HIDDEN, std=0.5)
        self.q, self.k, self.v = (
            tp.weight(f"self_attn.{name}_proj.weight", HIDDEN, HIDDEN).chunk(tp.size)[tp.rank]
            for name in "qkv"
        )
        self.o = tp.weight("self_attn.o_proj.weight", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]
        self.head = tp.weight("lm_head.weight", VOCAB, HIDDEN)

    def __call__(self, input_ids):
        return self.prefill(input_ids)[0]

    def prefill(self, input_ids):
        empty = self.embed.new_zeros(input_ids.shape[0], self.heads, 0, HEAD_DIM)
        return self.step(input_ids, (empty, empty))

    def step(self, input_ids, state):
        past_k, past_v = state
        start, length = past_k.shape[2], input_ids.shape[1]
        x = self.embed[input_ids] + self.positions[start : start + length]
        q, k, v = (self._split(x @ weight.T) for weight in (self.q, self.k, self.v))
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        visible = torch.ones(length, start + length, dtype=torch.bool).tril(start)
        scores = (q @ k.transpose(-1, -2)) / HEAD_DIM**0.5
        y = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        x = x + self.tp.all_reduce(y @ self.o.T)
        return x @ self.head.T, (k, v)

    def _split(self, x):
        return x.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)


@tpcheck.subject(vocab_size=VOCAB, seq_len=LONGEST)
def build(tp):
    return Model(tp)
