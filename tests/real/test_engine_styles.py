"""Engines as people write them: what a verdict says of a fused layer, and of a second request.

Evidence: each subject here is clean, and its faults are one line; written without looking at how
tpcheck reads modules, and each was once blamed on a clean module, or passed.
"""

import pytest
import torch
from torch import nn

import tpcheck

torch.set_num_threads(1)
VOCAB, HIDDEN, HEADS, HEAD_DIM, FFN, LONGEST = 72, 48, 24, 4, 96, 8


def verdict(build, tp_size=4):
    (found,) = tpcheck.run(build, (tp_size,), backend="sim", confirm=False).verdicts
    return found


def shard(weight, tp, dim=0):
    return weight.chunk(tp.size, dim)[tp.rank]


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Fused(nn.Module):
    """Several column-parallel layers as one: rank r holds [q_r | k_r | v_r]."""

    def __init__(self, tp, name, parts, out):
        super().__init__()
        self.parts = [shard(tp.weight(f"{name}.{part}", out, HIDDEN), tp) for part in parts]

    def forward(self, x):
        return x @ torch.cat(self.parts).T


class Row(nn.Module):
    def __init__(self, tp, name, width):
        super().__init__()
        self.tp = tp
        self.weight = shard(tp.weight(f"{name}.weight", HIDDEN, width), tp, 1)
        self.bias = tp.weight(f"{name}.bias", HIDDEN)
        self.scale = 1.0

    def forward(self, x):
        return self.tp.all_reduce((x @ self.weight.T) * self.scale) + self.bias


class Attention(nn.Module):
    def __init__(self, tp, name):
        super().__init__()
        self.heads, self.scale = HEADS // tp.size, None
        self.qkv_proj = Fused(tp, f"{name}.qkv", "qkv", HEADS * HEAD_DIM)
        self.o_proj = Row(tp, f"{name}.o", HEADS * HEAD_DIM)

    def forward(self, x):
        q, k, v = (heads(part, self.heads) for part in self.qkv_proj(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, tp, name):
        super().__init__()
        self.gate_up_proj = Fused(tp, f"{name}.gate_up", "gu", FFN)
        self.down_proj = Row(tp, f"{name}.down", FFN)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, tp, name):
        super().__init__()
        self.self_attn, self.mlp = Attention(tp, f"{name}.attn"), Mlp(tp, f"{name}.mlp")

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, tp):
        super().__init__()
        self.embed = tp.weight("embed.weight", VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(tp, f"layers.{index}") for index in range(2))

    def forward(self, input_ids):
        x = self.embed[input_ids]
        for layer in self.layers:
            x = layer(x)
        return x @ self.embed.T


def swap_parts(module):
    module.parts[1], module.parts[2] = module.parts[2], module.parts[1]


FAULTS = {
    "the last layer's sum is scaled": (
        lambda model: setattr(model.layers[1].mlp.down_proj, "scale", 1.5),
        "layers.1.mlp.down_proj",
        "rank 3's partial is off by a factor of 1.5",
    ),
    "attention has another scale": (
        lambda model: setattr(model.layers[1].self_attn, "scale", 0.4),
        "layers.1.self_attn.o_proj",
        "its input is off already on rank 3",
    ),
    "k and v are loaded into each other's place": (
        lambda model: swap_parts(model.layers[1].self_attn.qkv_proj),
        "layers.1.self_attn.qkv_proj",
        "read as parts, each cut in rank order",
    ),
}


@pytest.mark.parametrize("name", [None, *FAULTS])
def test_a_fused_layer_is_blamed_for_its_own_faults_only(name):
    plant, fqn, said = FAULTS.get(name, (None, "", ""))

    @tpcheck.subject(vocab_size=VOCAB, seq_len=LONGEST)
    def build(tp):
        model = Model(tp)
        if plant is not None and tp.size > 1 and tp.rank == tp.size - 1:
            plant(model)
        return model

    found = verdict(build)
    assert found.outcome == ("PASS" if name is None else "WRONG")
    if name is not None:
        first = found.first_divergence
        assert (first.fqn, first.rank) == (fqn, 3)
        assert said in first.detail


class OwnRow(Row):
    """Sums with torch.distributed itself, in place, as engines do."""

    def forward(self, x):
        y = (x @ self.weight.T) * self.scale
        torch.distributed.all_reduce(y, group=self.tp.process_group)
        return y + self.bias


@tpcheck.subject(vocab_size=VOCAB, seq_len=LONGEST)
def own_sums(tp):
    model = Model(tp)
    model.layers[1].mlp.down_proj = OwnRow(tp, "layers.1.mlp.own", FFN)
    model.layers[1].mlp.down_proj.scale = 1.5 if tp.size > 1 and tp.rank == 1 else 1.0
    return model


def test_the_rank_and_the_factor_are_named_where_an_engine_sums_by_itself():
    (found,) = tpcheck.run(own_sums, (2,), backend="gloo").verdicts
    first = found.first_divergence
    assert (first.fqn, first.rank) == ("layers.1.mlp.down_proj", 1)
    assert "rank 1's partial is off by a factor of 1.5" in first.detail


class SequenceParallel(nn.Module):
    """Every rank holds a piece of the tokens between the layers; the last ones may be pads."""

    def __init__(self, tp):
        super().__init__()
        self.tp, self.factor = tp, 1.0
        self.embed = tp.weight("embed.weight", VOCAB, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5, dtype=tp.dtype)
        self.up = Fused(tp, "gate_up", "gu", FFN)
        self.down = shard(tp.weight("down.weight", HIDDEN, FFN), tp, 1)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        padded = nn.functional.pad(input_ids, (0, -length % self.tp.size))
        x = self.norm(self.embed[shard(padded, self.tp, 1)])
        gate, up = self.up(self.tp.all_gather(x, 1)).chunk(2, -1)
        y = (nn.functional.silu(gate) * up * self.factor) @ self.down.T
        x = x + self.tp.reduce_scatter(y, 1)
        return self.tp.all_gather(x @ self.embed.T, 1)[:, :length]


@pytest.mark.parametrize(("length", "fqn"), [(8, "up"), (7, "norm")])
def test_pads_of_sequence_parallel_are_not_blamed(length, fqn):
    @tpcheck.subject(vocab_size=VOCAB, seq_len=length)
    def build(tp):
        model = SequenceParallel(tp)
        if tp.size > 1 and tp.rank == tp.size - 1:
            weight = model.up.parts[0] if fqn == "up" else model.norm.weight.data
            weight *= 1.1
        return model

    found = verdict(build)
    assert found.outcome == "WRONG"
    first = found.first_divergence
    assert (first.fqn, first.rank) == (fqn, 3)


class CachedDecoder:
    """The cache lives in the engine, as in those that allocate it once."""

    def __init__(self, tp, visible):
        self.tp, self.visible, self.requests, self.length = tp, visible, 0, 0
        self.embed = tp.weight("embed.weight", VOCAB, HIDDEN)
        self.qkv = Fused(tp, "qkv", "qkv", HEADS * HEAD_DIM)
        self.o_proj = Row(tp, "o", HEADS * HEAD_DIM)
        self.k = self.v = torch.zeros(2, HEADS // tp.size, LONGEST, HEAD_DIM, dtype=tp.dtype)

    def __call__(self, input_ids):
        self.length = 0
        return self.run(input_ids)

    def prefill(self, input_ids):
        self.length, self.requests = 0, self.requests + 1
        return self.run(input_ids), None

    def step(self, input_ids, state):
        return self.run(input_ids), state

    def run(self, input_ids):
        rows, start, stop = len(input_ids), self.length, self.length + input_ids.shape[1]
        x = self.embed[input_ids]
        q, k, v = (heads(y, HEADS // self.tp.size) for y in self.qkv(x).chunk(3, -1))
        self.k, self.v = self.k.clone(), self.v.clone()
        self.k[:rows, :, start:stop], self.v[:rows, :, start:stop] = k, v
        self.length = stop
        at = torch.arange(LONGEST)
        mask = at <= self.visible(self, torch.arange(start, stop))[:, None]
        y = nn.functional.scaled_dot_product_attention(q, self.k[:rows], self.v[:rows], mask)
        return (x + self.o_proj(y.transpose(1, 2).flatten(2))) @ self.embed.T


def stale(model, positions):
    """Let the last rank see one position of the request before."""
    wrong = model.tp.size > 1 and model.tp.rank == model.tp.size - 1 and model.requests > 1
    return positions + (1 if wrong and len(positions) == 1 else 0)


@pytest.mark.parametrize(
    ("visible", "outcome"), [(lambda _, positions: positions, "PASS"), (stale, "WRONG")]
)
def test_what_a_request_leaves_in_the_cache_must_not_show_in_the_next(visible, outcome):
    @tpcheck.subject(vocab_size=VOCAB, seq_len=LONGEST)
    def build(tp):
        return CachedDecoder(tp, visible)

    found = verdict(build, 2)
    assert found.outcome == outcome
    failed = [name for name, check in found.checks.items() if check.outcome == "FAIL"]
    assert failed == ([] if outcome == "PASS" else ["decode"])


class Norm(nn.Module):
    """In float32, whatever it is given."""

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def exported(module, tp):
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    example = torch.ones(2, 3, HIDDEN, dtype=tp.dtype)
    return torch.export.export(module, (example,), dynamic_shapes=sizes).module()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("made", [lambda norm, _: torch.jit.script(norm), exported])
@pytest.mark.parametrize("factor", [1.0, 1 + 2**-8])
def test_what_takes_no_hooks_and_no_eval_runs_all_the_same(made, factor):
    @tpcheck.subject(vocab_size=VOCAB, seq_len=LONGEST)
    def build(tp):
        model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), Row(tp, "row", FFN), made(Norm(), tp))
        model[0].weight = nn.Parameter(tp.weight("embed", VOCAB, HIDDEN))
        up = shard(tp.weight("up", FFN, HIDDEN), tp)
        model[1].register_forward_pre_hook(lambda _, args: torch.relu(args[0] @ up.T))
        model[1].scale = factor if tp.rank == 1 else 1.0
        return model

    found = verdict(build)
    assert found.outcome == ("PASS" if factor == 1 else "WRONG")
    assert found.checks["structural"].facts["dtype"] == "float32"  # its casts are seen
    if factor > 1:
        assert (found.first_divergence.fqn, found.first_divergence.rank) == ("1", 1)
