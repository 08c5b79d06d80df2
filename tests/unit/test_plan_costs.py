"""What a plan costs each rank, against numbers counted by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from tests.groups import single_group
from tests.unit.test_split_policies import MHA, PAD, UNALIGNED, UNEVEN, spec_of
from tpcheck.errors import PlanError
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import costs, imbalance, make_shard_plan
from tpcheck.spec import ModelSpec

LLAMA_8B = ModelSpec(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_llama_3_8b_costs_what_is_published() -> None:
    (one,) = costs(LLAMA_8B, make_shard_plan(LLAMA_8B, 1), batch=1, seq_len=8192)
    assert one.parameters == 8_030_261_248
    assert one.weight_bytes == 2 * 8_030_261_248
    assert one.kv_cache_bytes == 2 * 32 * 8 * 128 * 8192 * 2 == 1 << 30
    products = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert one.flops == 2 * 8192 * (products + 32 * 2 * 8192 * 4096)


def test_ranks_share_what_is_split_and_repeat_what_is_not() -> None:
    ranks = costs(LLAMA_8B, make_shard_plan(LLAMA_8B, 8), batch=4, seq_len=100)
    assert len(set(ranks)) == 1
    norms = 65 * 4096
    assert ranks[0].parameters == (8_030_261_248 - norms) // 8 + norms
    assert ranks[0].kv_cache_bytes == 2 * 32 * 1 * 128 * 400 * 2
    copies = costs(LLAMA_8B, make_shard_plan(LLAMA_8B, 16), batch=4, seq_len=100)
    assert copies[0].kv_cache_bytes == ranks[0].kv_cache_bytes
    int4 = costs(LLAMA_8B, make_shard_plan(LLAMA_8B, 8), weight_bits=4, kv_bits=8)[0]
    assert int4.weight_bytes * 4 == ranks[0].weight_bytes
    assert int4.kv_cache_bytes == 2 * 32 * 128


def test_every_parameter_is_counted_as_the_decoder_holds_it() -> None:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 9,
    }
    options = {"attention_bias": True, "mlp_bias": True, "qk_norm": "across_heads"}
    for spec in (
        spec_of(9, 3, num_hidden_layers=2, **options),
        spec_of(9, 3, num_hidden_layers=2, tie_word_embeddings=True, **experts),
    ):
        for policy in (PAD, UNEVEN, replace(PAD, kv="mha"), replace(UNEVEN, kv="unaligned")):
            plan = make_shard_plan(spec, 2, policy)
            for rank, cost in enumerate(costs(spec, plan)):
                decoder = build_decoder(spec, single_group(rank=rank, size=2), policy=policy)
                held = sum(local.numel() for local, _ in decoder.shards().values())
                assert cost.parameters == held


def test_the_kv_cache_holds_pads_and_copies_too() -> None:
    spec = spec_of(40, 10, num_hidden_layers=3)
    one_head = 2 * 3 * 4 * 7 * 2
    for policy, kv_heads in ((UNALIGNED, 3), (MHA, 10), (PAD, 3)):
        ranks = costs(spec, make_shard_plan(spec, 4, policy), seq_len=7)
        assert [rank.kv_cache_bytes for rank in ranks] == [kv_heads * one_head] * 4, policy


def test_a_tied_head_is_held_once_and_multiplied_with_all_the_same() -> None:
    tied, untied = (spec_of(8, tie_word_embeddings=tie) for tie in (True, False))
    a, b = (costs(spec, make_shard_plan(spec, 2), seq_len=3)[1] for spec in (tied, untied))
    assert a.flops == b.flops
    assert b.parameters - a.parameters == 10 * 16


def test_a_mixture_multiplies_with_the_chosen_experts_only() -> None:
    dense = spec_of(8, intermediate_size=24)
    mixture = spec_of(8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12)
    a, b = (costs(spec, make_shard_plan(spec, 4))[0] for spec in (dense, mixture))
    assert b.flops - a.flops == 2 * 6 * 16, "two experts of 12 are one MLP of 24, and a router"
    assert b.parameters > a.parameters


def test_uneven_heads_wait_for_the_slowest_and_padded_ones_compute_more() -> None:
    spec = spec_of(36)
    (uneven, *_), (padded, *_) = (
        imbalance(make_shard_plan(spec, 8, policy)) for policy in (UNEVEN, PAD)
    )
    assert uneven.per_rank == (5, 5, 5, 5, 4, 4, 4, 4)
    assert uneven.slowest_over_mean == Fraction(10, 9) == Fraction(5) / Fraction(36, 8)
    assert uneven.padding == 1
    assert padded.per_rank == (5,) * 8
    assert padded.slowest_over_mean == 1
    assert padded.padding == Fraction(40, 36)


def test_a_load_is_given_for_what_the_spec_has() -> None:
    def splits(spec: ModelSpec) -> list[str]:
        return [load.split for load in imbalance(make_shard_plan(spec, 2))]

    assert splits(spec_of(8)) == ["query", "intermediate", "vocab"]
    experts = spec_of(8, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8)
    assert splits(experts) == ["query", "moe_intermediate", "shared_expert_intermediate", "vocab"]
    vocab = imbalance(make_shard_plan(spec_of(8, vocab_size=50257), 8))[-1]
    assert vocab.padding == Fraction(50264, 50257)


@pytest.mark.parametrize("name", ["batch", "seq_len", "weight_bits", "kv_bits"])
def test_a_cost_of_nothing_is_refused(name: str) -> None:
    plan = make_shard_plan(LLAMA_8B, 2)
    with pytest.raises(PlanError, match=f"costs: {name}=0, but should be a whole number"):
        costs(LLAMA_8B, plan, **{name: 0})
