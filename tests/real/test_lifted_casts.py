"""Subjects that cast to narrow dtypes themselves: no bug hides in the noise of their own casts.

Requirement: a hard cast to bfloat16 leaves a float64 run with a noise floor of percents. A bug far
below it is found all the same, where TP=1 makes the cast and where only TP=N does; and what needs
its narrow dtype is judged by the floor, as ever.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import tpcheck

HIDDEN, HEADS, FFN, VOCAB = 64, 4, 160, 96
torch.set_num_threads(1)


def attention(q, k, v, narrow):
    if narrow:  # as kernels for 16 bits want it
        y = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), is_causal=True)
        return y.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def decoder(cast="", fault="", reads_bits=False):
    """Return a two-layer decoder of clean code but for one cast and one fault."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        def column(name, rows):
            return tp.weight(name, rows, HIDDEN).chunk(tp.size)[tp.rank]

        def row(name, columns):
            return tp.weight(name, HIDDEN, columns).chunk(tp.size, 1)[tp.rank]

        embed, head = tp.weight("embed", VOCAB, HIDDEN), tp.weight("head", VOCAB, HIDDEN)
        layers = [
            (
                [column(f"{i}.{name}", HIDDEN) for name in "qkv"],
                row(f"{i}.o", HIDDEN),
                [column(f"{i}.{name}", FFN) for name in ("gate", "up")],
                row(f"{i}.down", FFN),
            )
            for i in range(2)
        ]

        def all_reduce(x):
            narrow = cast == "wire" and tp.size > 1
            return tp.all_reduce(x.bfloat16() if narrow else x).to(x.dtype)

        def forward(input_ids):
            x = embed[input_ids]
            for i, (qkv, o, (gate, up), down) in enumerate(layers):
                h = F.rms_norm(x, (HIDDEN,))
                q, k, v = ((h @ w.T).unflatten(-1, (HEADS // tp.size, -1)) for w in qkv)
                q, k, v = (part.transpose(1, 2) for part in (q, k, v))
                narrow = cast == "attention" or (cast == "attention at TP=N" and tp.size > 1)
                y = attention(q, k, v, narrow)
                if reads_bits:
                    y = y.bfloat16().view(torch.int16).view(torch.bfloat16).to(y.dtype)
                if fault == "scale" and tp.size > 1 and tp.rank == 1:
                    y = y * (1 + 2**-9)
                x = x + all_reduce(y.transpose(1, 2).flatten(2) @ o.T)
                h = F.rms_norm(x, (HIDDEN,))
                y = F.silu(h @ gate.T) * (h @ up.T)
                if fault == "column" and i == 1 and tp.rank == tp.size - 1 > 0:
                    y = torch.cat([y[..., :-1], 0.99 * y[..., -1:]], -1)
                x = x + all_reduce(y @ down.T)
            return F.rms_norm(x, (HIDDEN,)) @ head.T

        return forward

    return build


def verdict_of(build, tp_size=4, dtype="bfloat16"):
    [found] = tpcheck.run(build, (tp_size,), dtypes=(dtype,), backend="sim", confirm=False).verdicts
    return found


CASTS = ["attention", "attention at TP=N", "wire"]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_clean_code_with_hard_casts_passes(cast, dtype):
    found = verdict_of(decoder(cast), dtype=dtype)
    structural = found.checks["structural"]
    assert structural.outcome == "PASS", structural.reason
    assert structural.facts["with_casts"]["limit"] > 1e-3
    assert structural.facts["limit"] == structural.facts["smallest_bug"] == 1e-12
    assert "but those that were lifted: half an ulp at the subject's" in structural.facts["source"]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("fault", ["scale", "column"])
def test_a_bug_far_below_the_noise_of_the_casts_is_found(cast, fault):
    found = verdict_of(decoder(cast, fault))
    structural = found.checks["structural"]
    assert found.outcome == "WRONG"
    assert structural.reason.startswith("with its own casts lifted, ")
    with_casts = structural.facts["with_casts"]
    assert with_casts["relative_rms"] < with_casts["limit"]
    assert structural.facts["relative_rms"] > structural.facts["limit"]


def test_a_coarser_wire_that_hides_in_the_drift_of_the_whole_is_said():
    said = "casts: TP=N alone rounds to bfloat16, which is coarser than float16"
    assert said in verdict_of(decoder("wire"), dtype="float16").reasons
    assert said not in verdict_of(decoder("attention"), dtype="float16").reasons
    assert not verdict_of(decoder("wire")).reasons


def test_code_that_reads_its_bits_is_judged_by_the_noise_floor():
    found = verdict_of(decoder(reads_bits=True))
    structural = found.checks["structural"]
    assert structural.outcome == "PASS"
    assert "with_casts" not in structural.facts
    assert structural.facts["smallest_bug"] == structural.facts["limit"] > 1e-3


def summed_as_codes(bits=8, fault="", kept=False, activations=False, wire="int8"):
    """Return a bare MLP whose ranks send their partials quantized, at TP=N alone.

    kept: it quantizes what it then multiplies, which is another function and no wire. activations:
    it does so at every degree.
    """

    def quantized(x):
        most = 2 ** (bits - 1) - 1
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / most
        return (x / scale).round().clamp(-most, most).to(torch.int8), scale

    def as_sent(x):
        if wire == "int8":
            return quantized(x)
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
        return (x / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale

    def as_received(codes, dtype):
        return (codes if wire == "int8" else codes.view(torch.float8_e4m3fn)).to(dtype)

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        embed = tp.weight("embed", VOCAB, HIDDEN)
        up = tp.weight("up", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        down = tp.weight("down", HIDDEN, FFN).chunk(tp.size, 1)[tp.rank]

        def all_reduce(partial):
            codes, scale = as_sent(partial)
            if fault == "scale" and tp.rank == 1:
                scale = scale.roll(1, 1)
            codes, scales = tp.all_gather(codes[None], 0), tp.all_gather(scale[None], 0)
            return (as_received(codes, partial.dtype) * scales).sum(0)

        def forward(input_ids):
            x = embed[input_ids]
            if activations or (kept and tp.size > 1):
                codes, scale = quantized(x)
                x = codes.to(x.dtype) * scale
            partial = F.relu(x @ up.T) @ down.T
            whole = kept or tp.size == 1
            return (x + (tp.all_reduce(partial) if whole else all_reduce(partial))) @ embed.T

        return forward

    return build


@pytest.mark.parametrize(("bits", "outcome"), [(8, "PASS"), (2, "DRIFT")])
def test_what_is_sent_in_integers_is_rounding_and_no_other_function(bits, outcome):
    found = verdict_of(summed_as_codes(bits))
    assert found.checks["structural"].outcome == "PASS"
    assert found.outcome == outcome, found.reasons
    assert any("is what it sends" in reason for reason in found.reasons)


@pytest.mark.parametrize("wire", ["int8", "float8"])
@pytest.mark.parametrize("activations", [False, True])
def test_a_quantized_wire_is_no_other_function_in_a_quantized_model_either(wire, activations):
    build = summed_as_codes(wire=wire, activations=activations)
    found = verdict_of(build)
    assert found.checks["structural"].outcome == "PASS", found.reasons
    assert found.checks["structural"].facts["smallest_bug"] < 1e-6
    assert found.outcome in ("PASS", "DRIFT")


@pytest.mark.parametrize("wire", ["int8", "float8"])
@pytest.mark.parametrize("activations", [False, True])
def test_a_wrong_scale_of_what_is_sent_is_wrong(wire, activations):
    build = summed_as_codes(fault="scale", wire=wire, activations=activations)
    assert verdict_of(build).outcome == "WRONG"


def test_what_tp_n_alone_quantizes_for_itself_is_another_function():
    assert verdict_of(summed_as_codes(kept=True)).outcome == "WRONG"


class Row(torch.nn.Module):
    def __init__(self, tp, name, columns, fault):
        super().__init__()
        self.tp, self.weight = tp, tp.weight(name, HIDDEN, columns).chunk(tp.size, 1)[tp.rank]
        self.factor = 1 + 2**-9 if fault and tp.size > 1 and tp.rank == 1 else 1

    def forward(self, x):
        return self.tp.all_reduce(x.bfloat16() @ self.weight.bfloat16().T * self.factor).to(x.dtype)


class Block(torch.nn.Module):
    def __init__(self, tp, name, fault):
        super().__init__()
        self.up = tp.weight(f"{name}.up", FFN, HIDDEN).chunk(tp.size)[tp.rank]
        self.down = Row(tp, f"{name}.down", FFN, fault)

    def forward(self, x):
        return x + self.down(F.silu(F.rms_norm(x, (HIDDEN,)) @ self.up.T))


class Stack(torch.nn.Module):
    def __init__(self, tp, faulty):
        super().__init__()
        self.scale = 1 + 1e-4 if faulty == "head" and tp.size > 1 else 1
        self.embed = tp.weight("embed", VOCAB, HIDDEN)
        self.blocks = torch.nn.ModuleList(Block(tp, f"{i}", i == faulty) for i in range(3))

    def forward(self, input_ids):
        x = self.embed[input_ids]
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.T * self.scale


@pytest.mark.parametrize("faulty", [0, 2])
def test_a_bug_below_the_noise_is_located_where_the_casts_are_lifted(faulty):
    build = tpcheck.subject(vocab_size=VOCAB, seq_len=9)(lambda tp: Stack(tp, faulty))
    found = verdict_of(build)
    assert found.outcome == "WRONG"
    assert found.checks["structural"].reason.startswith("with its own casts")
    assert found.first_divergence is not None
    assert found.first_divergence.fqn == f"blocks.{faulty}.down"
    assert found.first_divergence.rank == 1


def test_a_bug_beside_the_modules_is_told_as_that():
    build = tpcheck.subject(vocab_size=VOCAB, seq_len=9)(lambda tp: Stack(tp, "head"))
    found = verdict_of(build)
    assert found.outcome == "WRONG"
    assert found.first_divergence is None
    assert any("beside its modules" in reason for reason in found.reasons)
