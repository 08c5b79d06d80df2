"""What the fields of gpt-oss may say in a spec, and what its config.json gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.models import GPT_OSS_CONFIG
from tpcheck.errors import PlanError
from tpcheck.hf.config import spec_from_config
from tpcheck.spec import Case, RopeScaling

YARN = RopeScaling("yarn", 32.0, original_max_position_embeddings=16, truncate=False)
GPT_OSS = spec_from_config(GPT_OSS_CONFIG)


# the spec


def test_a_case_id_gives_the_same_spec_back() -> None:
    case = Case(7, 2, 16, GPT_OSS)
    assert Case.parse(case.id) == case
    assert hash(Case.parse(case.id)) == hash(case)
    assert '"layer_types":["sliding_attention","full_attention","sliding_attention"]' in case.id


def test_a_layer_has_the_window_of_its_kind() -> None:
    assert [GPT_OSS.window_of(layer) for layer in range(3)] == [3, 0, 3]
    assert [replace(GPT_OSS, layer_types=()).window_of(layer) for layer in range(3)] == [3, 3, 3]
    assert replace(GPT_OSS, num_hidden_layers=1).layer_types == ("sliding_attention",)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"layer_types": ("full_attention",)}, "for each of num_hidden_layers=3"),
        ({"layer_types": ("linear",) * 3}, "but should be a list of full_attention and sliding"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention', but should be a list"),
        ({"sliding_window": 0}, "sliding_window=0, but should be given: layer_types has sliding"),
        ({"swiglu_limit": -1.0}, "swiglu_limit=-1.0, but should be a positive number"),
        ({"swiglu_limit": False}, "swiglu_limit=False, but should be a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but should be 'silu' where swiglu_limit=7.0"),
        ({"mlp": "plain"}, "mlp='plain', but should be 'gated' where swiglu_limit=7.0"),
        ({"router_scoring": "top"}, "router_scoring='top', but should be one of softmax_topk"),
        ({"attention_sinks": 1}, "attention_sinks=1, but should be true or false"),
        (
            {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0},
            "router_bias=True, but should be left out where num_experts=0",
        ),
    ],
)
def test_what_contradicts_itself_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError) as error:
        replace(GPT_OSS, **fields)
    assert phrase in str(error.value)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"beta_fast": 1.0}, "beta_slow=1.0, but should be below beta_fast=1.0"),
        ({"truncate": 0}, "truncate=0, but should be true or false"),
        ({"attention_factor": -1.0}, "attention_factor=-1.0, but should be a positive number"),
    ],
)
def test_a_yarn_that_cannot_be_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError) as error:
        replace(YARN, **fields)
    assert phrase in str(error.value)


# config.json


def test_what_a_config_leaves_out_is_what_transformers_gives() -> None:
    transformers = pytest.importorskip("transformers")
    least = {"model_type": "gpt_oss", "vocab_size": 64, "num_hidden_layers": 5}
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 16}
    full = transformers.GptOssConfig(**least, **sizes).to_dict()
    assert {"rope_parameters", "layer_types", "head_dim", "swiglu_limit"} <= set(full)
    spec = spec_from_config({**least, **sizes})
    assert spec == spec_from_config(full)
    assert (spec.head_dim, spec.num_key_value_heads, spec.num_experts) == (64, 8, 128)
    assert (spec.rope_theta, spec.sliding_window, spec.swiglu_limit) == (150000.0, 128, 7.0)
    assert spec.layer_types[:2] == ("sliding_attention", "full_attention")
    assert spec.rope_scaling == RopeScaling(
        "yarn", 32.0, original_max_position_embeddings=4096, truncate=False
    )


def test_openais_name_for_the_chosen_experts_is_read() -> None:
    fields = {
        name: value for name, value in GPT_OSS_CONFIG.items() if name != "num_experts_per_tok"
    }
    assert spec_from_config({**fields, "experts_per_token": 3}).num_experts_per_tok == 3
    assert spec_from_config({**GPT_OSS_CONFIG, "experts_per_token": 2}) == GPT_OSS
    assert spec_from_config(fields).num_experts_per_tok == 4


def test_both_spellings_of_rope_are_one_spec() -> None:
    old = {name: value for name, value in GPT_OSS_CONFIG.items() if name != "rope_parameters"}
    assert spec_from_config({**old, "rope_scaling": GPT_OSS_CONFIG["rope_parameters"]}) == GPT_OSS


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"experts_per_token": 3}, "experts_per_token=3, but should be num_experts_per_tok=2"),
        ({"swiglu_limit": 0}, "swiglu_limit=0, but should be positive"),
        ({"sliding_window": None}, "sliding_window=0, but should be given"),
        ({"layer_types": ["full_attention"] * 4}, "has 4 entries, but should have"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: factor is missing"),
    ],
)
def test_what_a_config_cannot_say_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError) as error:
        spec_from_config({**GPT_OSS_CONFIG, **fields})
    assert phrase in str(error.value)
