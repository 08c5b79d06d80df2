"""Clean: torch's own parallelize_module on tp.mesh, returning local or DTensor logits."""

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import tpcheck

VOCAB, HIDDEN, FFN = 96, 32, 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.up_proj = nn.Linear(HIDDEN, FFN)
        self.down_proj = nn.Linear(FFN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        x = x + self.down_proj(nn.functional.gelu(self.up_proj(x)))
        return self.lm_head(x)


def _build(tp, head):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    model = Model().to(tp.device, tp.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tp.weight(name, *parameter.shape))
    plan = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "up_proj": ColwiseParallel(),
        "down_proj": RowwiseParallel(),
        "lm_head": head,
    }
    return parallelize_module(model, tp.mesh, plan)


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def local_logits(tp):
    return _build(tp, ColwiseParallel(output_layouts=Replicate()))


@tpcheck.subject(vocab_size=VOCAB, seq_len=16)
def dtensor_logits(tp):
    return _build(tp, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False))
