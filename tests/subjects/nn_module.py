"""Clean: the subject is an nn.Module with named submodules, returned as it is."""

import torch
from torch import nn

import tpcheck

VOCAB, HIDDEN, FFN, LAYERS = 96, 32, 64, 2


class ColumnParallelLinear(nn.Module):
    def __init__(self, tp, name, in_features, out_features):
        super().__init__()
        if out_features % tp.size:
            raise tpcheck.IllegalDegreeError(f"{name}: {out_features=}, tp_size={tp.size}")
        full = tp.weight(f"{name}.weight", out_features, in_features)
        bias = tp.weight(f"{name}.bias", out_features)
        self.weight = nn.Parameter(full.chunk(tp.size)[tp.rank])
        self.bias = nn.Parameter(bias.chunk(tp.size)[tp.rank])

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    def __init__(self, tp, name, in_features, out_features):
        super().__init__()
        self.tp = tp
        full = tp.weight(f"{name}.weight", out_features, in_features)
        self.weight = nn.Parameter(full.chunk(tp.size, 1)[tp.rank])
        self.bias = nn.Parameter(tp.weight(f"{name}.bias", out_features))

    def forward(self, x):
        return self.tp.all_reduce(nn.functional.linear(x, self.weight)) + self.bias


class MLP(nn.Module):
    def __init__(self, tp, name):
        super().__init__()
        self.up_proj = ColumnParallelLinear(tp, f"{name}.up_proj", HIDDEN, FFN)
        self.down_proj = RowParallelLinear(tp, f"{name}.down_proj", FFN, HIDDEN)

    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.up_proj(x)))


class Model(nn.Module):
    def __init__(self, tp):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(
            tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
        )
        self.layers = nn.ModuleList(MLP(tp, f"layers.{i}") for i in range(LAYERS))
        self.dropout = nn.Dropout(0.1)  # off: tpcheck runs modules in eval mode
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=tp.dtype)
        with torch.no_grad():
            self.lm_head.weight.copy_(tp.weight("lm_head.weight", VOCAB, HIDDEN))

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + self.dropout(layer(x))
        return self.lm_head(x)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def build(tp):
    return Model(tp)
