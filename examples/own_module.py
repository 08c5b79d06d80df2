"""Your own module, unmodified, and the lines that let tpcheck run it.

    tpcheck run examples/own_module.py:build --tp 2,4

The module calls torch.distributed itself and loads a checkpoint by its names; tpcheck gives it a
process group of real ranks and generated weights.
"""

import torch
import torch.distributed as dist
from torch import nn


class ParallelMLP(nn.Module):
    """A gated MLP: gate and up are split by rows, down by columns."""

    def __init__(self, hidden: int, ffn: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        local = ffn // dist.get_world_size(group)
        self.gate_proj = nn.Linear(hidden, local, bias=False)
        self.up_proj = nn.Linear(hidden, local, bias=False)
        self.down_proj = nn.Linear(local, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        dist.all_reduce(y, group=self.group)
        return y


class Model(nn.Module):
    def __init__(self, vocab: int, hidden: int, ffn: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.embed_tokens = nn.Embedding(vocab, hidden)
        self.norm = nn.RMSNorm(hidden, eps=1e-6)
        self.mlp = ParallelMLP(hidden, ffn, group)
        self.lm_head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        return self.lm_head(x + self.mlp(self.norm(x)))

    def load_weights(self, weights) -> None:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if "mlp." in name:
                tensor = tensor.chunk(size, dim=1 if "down_proj" in name else 0)[rank]
            parameters[name].data.copy_(tensor)


# ---- all that tpcheck needs: ----
import tpcheck

SHAPES = {"embed_tokens.weight": (96, 32), "norm.weight": (32,), "mlp.gate_proj.weight": (64, 32)}
SHAPES |= {"mlp.up_proj.weight": (64, 32), "mlp.down_proj.weight": (32, 64)}
SHAPES |= {"lm_head.weight": (96, 32)}


@tpcheck.subject(vocab_size=96, seq_len=16, weights=SHAPES)
def build(tp: tpcheck.TPGroup):
    if 64 % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size=64, tp_size={tp.size}")
    model = Model(96, 32, 64, tp.process_group).to(tp.device, tp.dtype)
    model.load_weights(tp.named_weights())
    return model
