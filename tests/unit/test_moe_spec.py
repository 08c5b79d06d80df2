"""What the fields of a mixture of experts may say, how its plan splits it, what configs give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tpcheck.errors import IllegalDegreeError, PlanError
from tpcheck.hf.config import spec_from_config
from tpcheck.shard_plan import Span, legal_tp_sizes, make_shard_plan
from tpcheck.spec import ModelSpec

DENSE = ModelSpec(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=24,
    num_key_value_heads=1,
    head_dim=4,
)
MIXTRAL = replace(
    DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"num_experts": -1}, "num_experts=-1, but should be a whole number of at least 0"),
        ({"num_experts": True}, "num_experts=True, but should be a whole number of at least 0"),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok=9, but should be from 1 to num_experts=8",
        ),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0, but should be from 1 to num_experts"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no', but should be true or false"),
        ({"moe_intermediate_size": 2.5}, "moe_intermediate_size=2.5, but should be a whole number"),
        ({"shared_expert_intermediate_size": -4}, "shared_expert_intermediate_size=-4, but should"),
        ({"mlp": "plain"}, "mlp='plain', but should be 'gated' where num_experts=8"),
        (
            {"num_experts": 0},
            "num_experts_per_tok=2, but should be left out where num_experts=0: a dense model",
        ),
        (
            {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0},
            "norm_topk_prob=True, but should be left out where num_experts=0",
        ),
    ],
)
def test_what_contradicts_itself_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError) as error:
        replace(MIXTRAL, **fields)
    assert phrase in str(error.value)


def test_the_width_of_an_expert_is_derived_as_mixtral_does() -> None:
    spec = replace(DENSE, num_experts=4, num_experts_per_tok=2)
    assert spec.moe_intermediate_size == DENSE.intermediate_size
    assert ModelSpec.from_fields(spec.to_fields()) == spec
    assert DENSE.moe_intermediate_size == 0


def test_the_plan_splits_every_expert_and_the_shared_one() -> None:
    plan = make_shard_plan(replace(MIXTRAL, shared_expert_intermediate_size=48), 3)
    assert [rank.moe_intermediate for rank in plan.ranks] == [Span(0, 8), Span(8, 16), Span(16, 24)]
    assert [rank.shared_expert_intermediate.size for rank in plan.ranks] == [16] * 3
    assert {rank.intermediate for rank in plan.ranks} == {Span(0, 0)}
    dense = make_shard_plan(DENSE, 3)
    assert [rank.intermediate for rank in dense.ranks] == [Span(0, 16), Span(16, 32), Span(32, 48)]
    assert {rank.moe_intermediate for rank in dense.ranks} == {Span(0, 0)}


def test_widths_that_do_not_divide_are_refused_with_what_fits() -> None:
    spec = replace(
        MIXTRAL,
        intermediate_size=7,  # no layer has a dense MLP: it does not count
        moe_intermediate_size=20,
        shared_expert_intermediate_size=30,
        model_type="qwen2_moe",
    )
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(spec, 8)
    assert str(error.value) == (
        "layers.*.mlp.experts.*: moe_intermediate_size=20, but should be divisible by tp_size=8"
        " [qwen2_moe, tp_size=8]\n"
        "  layers.*.mlp.shared_expert: shared_expert_intermediate_size=30, but should be divisible"
        " by tp_size=8\n"
        "  tp_size that fit this spec, up to 16: 1, 2"
    )
    assert legal_tp_sizes(spec, 12) == (1, 2)


# config.json

MIXTRAL_CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
QWEN2_CONFIG = {**MIXTRAL_CONFIG, "model_type": "qwen2_moe", "moe_intermediate_size": 1408}
QWEN3_CONFIG = {**MIXTRAL_CONFIG, "model_type": "qwen3_moe", "num_experts": 128, "head_dim": 128}


def test_what_a_config_leaves_out_is_what_transformers_gives() -> None:
    mixtral = spec_from_config(MIXTRAL_CONFIG)
    assert (mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.norm_topk_prob) == (
        8,
        2,
        True,
    )
    assert (mixtral.moe_intermediate_size, mixtral.num_key_value_heads) == (14336, 8)
    assert (mixtral.rope_theta, mixtral.norm_eps, mixtral.sliding_window) == (1e6, 1e-5, 0)
    qwen2 = spec_from_config(QWEN2_CONFIG)
    assert (qwen2.num_experts, qwen2.num_experts_per_tok, qwen2.norm_topk_prob) == (60, 4, False)
    assert (qwen2.shared_expert_intermediate_size, qwen2.attention_bias) == (5632, True)
    qwen3 = spec_from_config({**QWEN3_CONFIG, "norm_topk_prob": True})
    assert (qwen3.num_experts, qwen3.num_experts_per_tok, qwen3.norm_topk_prob) == (128, 8, True)
    assert (qwen3.qk_norm, qwen3.shared_expert_intermediate_size) == ("per_head", 0)


def test_both_spellings_of_the_number_of_experts_are_read() -> None:
    fields = {name: value for name, value in QWEN3_CONFIG.items() if name != "num_experts"}
    assert spec_from_config({**fields, "num_local_experts": 16}).num_experts == 16
    assert (
        spec_from_config({**fields, "num_experts": 16, "num_local_experts": 16}).num_experts == 16
    )


def test_windows_of_sparse_models_are_read_where_they_are_used() -> None:
    assert spec_from_config({**MIXTRAL_CONFIG, "sliding_window": 9}).sliding_window == 9
    window = {"use_sliding_window": True, "sliding_window": 9}
    assert spec_from_config({**QWEN3_CONFIG, **window}).sliding_window == 9
    assert spec_from_config({**QWEN3_CONFIG, "sliding_window": 9}).sliding_window == 0
    kinds = {"layer_types": ["sliding_attention"] * 32}
    assert spec_from_config({**QWEN2_CONFIG, **window, **kinds}).sliding_window == 9


@pytest.mark.parametrize(
    ("config", "phrase"),
    [
        ({**QWEN3_CONFIG, "mlp_only_layers": [0]}, "mlp_only_layers=[0], but should be []"),
        ({**QWEN2_CONFIG, "decoder_sparse_step": 2}, "decoder_sparse_step=2, but should be 1"),
        ({**QWEN3_CONFIG, "num_experts": 0}, "num_experts=0, but should be at least 1"),
        (
            {**QWEN3_CONFIG, "num_local_experts": 4},
            "num_experts=128, but should be num_local_experts=4",
        ),
        ({**MIXTRAL_CONFIG, "num_experts_per_tok": 9}, "num_experts_per_tok=9, but should be from"),
        ({**QWEN2_CONFIG, "use_sliding_window": True}, "use_sliding_window=True, but should be"),
    ],
)
def test_sparse_models_that_the_reference_cannot_do_are_named(
    config: dict[str, Any], phrase: str
) -> None:
    with pytest.raises(PlanError) as error:
        spec_from_config(config)
    assert phrase in str(error.value)
