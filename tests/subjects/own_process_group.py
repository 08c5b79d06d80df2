"""Clean: a model that knows nothing of tpcheck; it calls torch.distributed on a process group.

Its loader takes Hugging Face names and stacks q, k, v and gate, up into fused weights, which is
where shard orders go wrong in practice. tpcheck lends the process group and the weights.
"""

import torch
import torch.distributed as dist
from torch import nn

import tpcheck

VOCAB, HIDDEN, FFN, HEADS, HEAD_DIM = 96, 64, 96, 8, 8


class Linear(nn.Module):
    """`dim` 0: a slice of the outputs per rank. 1: of the inputs, and the results are summed."""

    def __init__(self, group, out_features, in_features, dim):
        super().__init__()
        self.group, self.dim = group, dim
        shape = [out_features, in_features]
        shape[dim] //= dist.get_world_size(group)
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x):
        y = x @ self.weight.T
        if self.dim == 1:
            dist.all_reduce(y, group=self.group)
        return y

    def load(self, full, part=0, parts=1):
        """Copy this rank's slice of one of the `parts` weights that are stacked in this one."""
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        local = self.weight.data.chunk(parts, 0)[part]
        local.copy_(full.chunk(size, self.dim)[rank])


class Layer(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.input_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.qkv = Linear(group, 3 * HIDDEN, HIDDEN, 0)
        self.o = Linear(group, HIDDEN, HIDDEN, 1)
        self.post_norm = nn.RMSNorm(HIDDEN, eps=1e-6)
        self.gate_up = Linear(group, 2 * FFN, HIDDEN, 0)
        self.down = Linear(group, HIDDEN, FFN, 1)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for t in self.qkv(self.input_norm(x)).chunk(3, -1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(group)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def load_weights(self, weights):
        layer = self.layers[0]
        load = {
            "model.embed_tokens.weight": self.embed.weight.data.copy_,
            "model.layers.0.input_layernorm.weight": layer.input_norm.weight.data.copy_,
            "model.layers.0.self_attn.q_proj.weight": lambda w: layer.qkv.load(w, 0, 3),
            "model.layers.0.self_attn.k_proj.weight": lambda w: layer.qkv.load(w, 1, 3),
            "model.layers.0.self_attn.v_proj.weight": lambda w: layer.qkv.load(w, 2, 3),
            "model.layers.0.self_attn.o_proj.weight": layer.o.load,
            "model.layers.0.post_attention_layernorm.weight": layer.post_norm.weight.data.copy_,
            "model.layers.0.mlp.gate_proj.weight": lambda w: layer.gate_up.load(w, 0, 2),
            "model.layers.0.mlp.up_proj.weight": lambda w: layer.gate_up.load(w, 1, 2),
            "model.layers.0.mlp.down_proj.weight": layer.down.load,
            "lm_head.weight": self.head.weight.data.copy_,
        }
        for name, tensor in weights:
            load[name](tensor)


WEIGHTS = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
    "lm_head.weight": (VOCAB, HIDDEN),
}


@tpcheck.subject(vocab_size=VOCAB, seq_len=16, weights=WEIGHTS)
def build(tp):
    if HEADS % tp.size:
        raise tpcheck.IllegalDegreeError(f"num_attention_heads={HEADS}, tp_size={tp.size}")
    model = Model(tp.process_group).to(tp.device, tp.dtype)
    model.load_weights(tp.named_weights())
    return model
