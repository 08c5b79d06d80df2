"""Clean: the subject takes hidden states and positions, made by its own `inputs` function."""

import torch
import torch.nn.functional as F

import tpcheck

HIDDEN, FFN, LONGEST = 32, 64, 12


def make_inputs(generator):
    hidden = torch.randn(3, LONGEST, HIDDEN, generator=generator)
    positions = torch.randint(0, LONGEST, (3, LONGEST), generator=generator)
    return hidden, positions


@tpcheck.subject(inputs=make_inputs, sweep=False)
def build(tp):
    if FFN % tp.size:
        raise tpcheck.IllegalDegreeError(f"intermediate_size={FFN}, tp_size={tp.size}")
    table = tp.weight("embed_positions.weight", LONGEST, HIDDEN)
    gate = tp.weight("gate_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    up = tp.weight("up_proj.weight", FFN, HIDDEN).chunk(tp.size)[tp.rank]
    down = tp.weight("down_proj.weight", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]

    def forward(hidden, positions):
        x = hidden + table[positions]
        return x + tp.all_reduce((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)

    return forward
