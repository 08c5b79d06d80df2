"""Caches and tables that build makes narrow: no bug hides in what they round.

Requirement: a KV cache made for bfloat16 rounds whatever a float64 run puts into it, as a cast of
forward does. So build is lifted with forward; where it cannot be, forward alone is, and where
neither can, a PASS says what it hides.
"""

import pytest
import torch
import torch.nn.functional as F

import tpcheck

VOCAB, HIDDEN, HEADS, DIM = 96, 48, 12, 4
torch.set_num_threads(1)


@torch.library.custom_op("tpcheck_tests::silu", mutates_args=())
def silu(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x)


def cached(scale=0.0, *, reads_bits=False):
    """Return attention over a bfloat16 cache, whose last rank may count `scale` more."""

    @tpcheck.subject(vocab_size=VOCAB, seq_len=9)
    def build(tp):
        heads = HEADS // tp.size
        embed = tp.weight("embed", VOCAB, HIDDEN)
        wq, wk, wv = (tp.weight(f"w{c}", HIDDEN, HIDDEN).chunk(tp.size)[tp.rank] for c in "qkv")
        wo = tp.weight("wo", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]
        keys = torch.zeros(2, 64, heads, DIM, dtype=torch.bfloat16)
        values = torch.zeros_like(keys)
        if reads_bits:
            assert not keys.view(torch.int16).any()

        def forward(input_ids):
            rows, tokens = input_ids.shape
            x = embed[input_ids]
            q, k, v = ((x @ w.T).view(rows, tokens, heads, DIM) for w in (wq, wk, wv))
            keys[:rows, :tokens], values[:rows, :tokens] = k, v
            held = (part[:rows, :tokens].to(x.dtype).transpose(1, 2) for part in (keys, values))
            y = F.scaled_dot_product_attention(q.transpose(1, 2), *held, is_causal=True)
            if tp.size > 1 and tp.rank == tp.size - 1:
                y = y * (1 + scale)
            return (x + tp.all_reduce(y.transpose(1, 2).flatten(2) @ wo.T)) @ embed.T

        return forward

    return build


@tpcheck.subject(vocab_size=VOCAB, seq_len=9)
def through_an_op_of_its_own(tp):
    embed = tp.weight("embed", VOCAB, HIDDEN)
    up = tp.weight("up", 96, HIDDEN).chunk(tp.size)[tp.rank]
    down = tp.weight("down", HIDDEN, 96).chunk(tp.size, 1)[tp.rank]

    def forward(input_ids):
        x = embed[input_ids].bfloat16().to(embed.dtype)
        return (x + tp.all_reduce(torch.ops.tpcheck_tests.silu(x @ up.T) @ down.T)) @ embed.T

    return forward


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_clean_cache_passes_and_its_limit_is_float64s(dtype):
    report = tpcheck.run(cached(), (2, 4), backend="sim", dtypes=(dtype,))
    for verdict in report.verdicts:
        assert verdict.outcome == "PASS", verdict.reasons
        assert verdict.checks["structural"].facts["limit"] == 1e-12


@pytest.mark.parametrize("scale", [1e-2, 2**-7, 1e-5])
def test_a_bug_below_what_a_cache_rounds_is_found(scale):
    (verdict,) = tpcheck.run(cached(scale), (2,), backend="sim", confirm=False).verdicts
    assert verdict.outcome == "WRONG"
    structural = verdict.checks["structural"]
    assert structural.facts["with_casts"]["limit"] > 1e-3
    assert structural.reason.startswith("with its own casts lifted")


def test_it_is_found_on_real_ranks_too():
    assert tpcheck.run(cached(2**-7), (2,), backend="gloo").outcome == "WRONG"


def test_a_build_that_reads_bits_is_lifted_in_forward_alone():
    (verdict,) = tpcheck.run(cached(reads_bits=True), (2,), backend="sim").verdicts
    assert verdict.outcome == "PASS"
    assert 1e-12 < verdict.checks["structural"].facts["limit"] < 0.1
    assert "with_casts" in verdict.checks["structural"].facts


def test_casts_that_cannot_be_lifted_are_remarked_on_with_what_they_hide():
    (verdict,) = tpcheck.run(through_an_op_of_its_own, (2,), backend="sim").verdicts
    assert verdict.outcome == "PASS"
    (remark,) = (reason for reason in verdict.reasons if reason.startswith("structural"))
    assert "its own casts to bfloat16 hide what is smaller than 0.0" in remark
    assert "(tpcheck_tests::silu cannot be computed in torch.float64)" in remark
