"""plan: what holds for any config on any engine, what real models get, and how misuse is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from tests.configs import PHI_4, QWEN_30B, QWEN_72B_INT4
from tpcheck.engines.base import OUTCOMES, REFUSED
from tpcheck.engines.registry import engine_named
from tpcheck.errors import PlanError, TPCheckError
from tpcheck.planning import ENGINE_NAMES, plan
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.spec import ModelSpec

QWEN_30B_FP8 = {
    **QWEN_30B,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4"},
}
INTERN_VL = {
    "model_type": "internvl_chat",
    "llm_config": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "vision_config": {
        "model_type": "intern_vit_6b",
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_attention_heads": 25,
    },
}


def outcomes(config: dict[str, Any], tp_size: int) -> dict[str, str]:
    return {result.engine: result.outcome for result in plan(config, tp_sizes=(tp_size,))}


def only(config: Any, engine: str, tp_size: int) -> tpcheck.PlanResult:
    (result,) = plan(config, engine, (tp_size,))
    return result


# -- what holds for any config

SIZES = st.integers(1, 400)
GROUPS = st.sampled_from([-1, 32, 64, 128])
QUANTS = st.one_of(
    st.none(),
    st.builds(
        lambda block: {"quant_method": "fp8", "weight_block_size": [block, block]},
        st.sampled_from([16, 64, 128]),
    ),
    st.builds(
        lambda method, group, act: {"quant_method": method, "group_size": group, "desc_act": act},
        st.sampled_from(["gptq", "awq"]),
        GROUPS,
        st.booleans(),
    ),
    st.sampled_from(
        [{"quant_method": name} for name in ("mxfp4", "nvfp4", "bitsandbytes", "exl2", "odd")]
    ),
)
MODEL_TYPES = st.sampled_from(
    [None, "llama", "phi3", "gpt2", "opt", "qwen2", "falcon", "gpt_oss", "deepseek_v3", "new"]
)


@st.composite
def configs(draw: st.DrawFn, *, plain: bool = False) -> dict[str, Any]:
    """Draw a well-formed config; `plain` is a dense one whose vocabulary needs no padding."""
    kv_heads = draw(st.integers(1, 16))
    config: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 8)),
        "head_dim": 2 * draw(st.integers(1, 64)),
        "hidden_size": 16 * draw(SIZES),
        "intermediate_size": (128 if plain else draw(st.sampled_from([1, 16, 128]))) * draw(SIZES),
        "vocab_size": 128 * draw(SIZES) if plain else draw(st.integers(1, 60_000)),
    }
    if plain:
        return config
    config["model_type"] = draw(MODEL_TYPES)
    config["quantization_config"] = draw(QUANTS)
    if draw(st.booleans()):
        config |= {"num_experts": draw(SIZES), "moe_intermediate_size": 16 * draw(SIZES)}
    if draw(st.booleans()):
        config = {"text_config": config, "vision_config": {"num_heads": draw(st.integers(1, 30))}}
    missing = draw(st.sets(st.sampled_from(sorted(config))))
    return {name: value for name, value in config.items() if name not in missing}


@given(config=configs(), tp_size=st.integers(1, 70), engine=st.sampled_from(ENGINE_NAMES))
def test_a_degree_is_refused_exactly_when_it_is_not_listed_as_legal(
    config: dict[str, Any], tp_size: int, engine: str
) -> None:
    result = only(config, engine, tp_size)
    assert result.outcome in OUTCOMES
    assert result.is_legal == (result.outcome not in REFUSED)
    if tp_size <= 64:
        assert result.is_legal == (tp_size in result.legal_tp_sizes)
    assert result.reason
    assert "\n" not in result.reason
    assert result.source.startswith(engine)
    assert (result.fix is None) or not result.is_legal
    json.dumps(dict(result.sizes), allow_nan=False)


@given(config=configs(plain=True))
def test_one_rank_runs_a_plain_dense_model_on_every_engine(config: dict[str, Any]) -> None:
    assert set(outcomes(config, 1).values()) == {"ok"}


def per_rank(sizes: Any, tp_size: int) -> list[tuple[str, int]]:
    """Return (fact, what all ranks hold together) for every size that says it."""
    found = []
    rows = {
        "lm_head_rows_per_rank": "vocab_size",
        "num_heads": "num_attention_heads",
        "q_per_rank": "num_attention_heads",
        "q_heads_after": "num_attention_heads",
        "down_in": "intermediate_size",
        "intermediate": "intermediate_size",
    }
    for name, value in sizes.items():
        if isinstance(value, dict):
            found += per_rank(value, tp_size)
            if "padded" in value:
                found.append(("vocab_size", value["per_rank"] * tp_size))
        elif name in rows:
            held = sum(value) if isinstance(value, list) else value * tp_size
            found.append((rows[name], held))
    return found


@given(config=configs(plain=True), tp_size=st.integers(1, 16), engine=st.sampled_from(ENGINE_NAMES))
def test_what_ranks_hold_adds_up_to_at_least_the_whole(
    config: dict[str, Any], tp_size: int, engine: str
) -> None:
    result = only(config, engine, tp_size)
    if not result.is_legal:
        return
    for fact, held in per_rank(result.sizes, tp_size):
        assert held >= config[fact], (engine, fact)


@given(config=configs(plain=True), tp_size=st.integers(1, 16))
def test_uneven_shards_add_up_to_exactly_the_whole(config: dict[str, Any], tp_size: int) -> None:
    layers = only(config, "deepspeed", tp_size).sizes
    assert sum(layers["mlp"]["shard_sizes"]) == config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    assert sum(layers["self_attn.q_proj"]["shard_sizes"]) == queries
    split = only(config, "exllamav2", tp_size).sizes["split"]
    assert sum(split["kv_heads"]) == config["num_key_value_heads"]
    assert sum(split["intermediate"]) == config["intermediate_size"]
    last = only({**config, "head_dim": 128}, "exllamav3", tp_size).sizes["plan"][-1]
    assert last["attn"][1] == config["num_key_value_heads"]
    assert last["lm_head"][1] == config["vocab_size"]


@given(config=configs(plain=True))
def test_the_reference_is_what_the_shard_plan_says(config: dict[str, Any]) -> None:
    spec = ModelSpec(num_hidden_layers=1, **config)
    for given_as in (config, spec):
        assert only(given_as, "reference", 1).legal_tp_sizes == legal_tp_sizes(spec)


@given(
    blocks=st.integers(1, 400),
    tp_size=st.sampled_from([2, 3, 4, 6, 8]),
    engine=st.sampled_from(["vllm", "sglang", "tgi", "transformers", "tensorrt-llm"]),
    quant=st.sampled_from(
        [
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"quant_method": "gptq", "group_size": 128},
            {"quant_method": "awq", "group_size": 128},
        ]
    ),
)
def test_the_width_a_fix_names_is_legal(
    blocks: int, tp_size: int, engine: str, quant: dict[str, Any]
) -> None:
    config = {"hidden_size": 1024, "intermediate_size": 128 * blocks, "quantization_config": quant}
    result = only(config, engine, tp_size)
    if result.is_legal:
        return
    if result.rule_id and result.rule_id.endswith(".formats"):
        return  # no width helps a form that is not read
    named = re.search(r"pad intermediate_size to (\d+)", result.fix or "")
    assert named, result
    assert only({**config, "intermediate_size": int(named[1])}, engine, tp_size).is_legal


# -- what real models get


def test_phi_4_on_four_ranks_is_refused_unless_kv_heads_need_not_divide() -> None:
    found = outcomes(PHI_4, 4)
    del found["reference"]
    assert found == {
        "vllm": "error",
        "sglang": "error",
        "megatron": "error",
        "tensorrt-llm": "error",
        "tgi": "error",
        "transformers": "ok",
        "pytorch-dtensor": "late_error",
        "deepspeed": "uneven",
        "neuronx-distributed": "pad",
        "exllamav2": "error",
        "exllamav3": "ok",
    }
    result = only(PHI_4, "vllm", 4)
    assert result.legal_tp_sizes == (1, 2)
    assert result.fix == "repeat KV heads to num_key_value_heads=20; or use tp_size=2"
    assert result.error_text == ""
    assert result.reason == (
        "num_key_value_heads=10 and tp_size=4 do not divide one another (a bare assert, no text)"
    )


def test_phi_4_on_five_ranks_has_a_vocabulary_that_only_some_engines_can_split() -> None:
    found = outcomes(PHI_4, 5)
    assert (found["vllm"], found["sglang"], found["tgi"]) == ("error", "pad", "replicate")
    assert only(PHI_4, "vllm", 5).error_text == "100352 is not divisible by 5"


@pytest.mark.parametrize(
    ("engine", "outcome"), [("vllm", "silent_wrong"), ("sglang", "silent_wrong"), ("tgi", "error")]
)
def test_231_groups_on_two_ranks_need_a_wider_mlp(engine: str, outcome: str) -> None:
    result = only(QWEN_72B_INT4, engine, 2)
    assert result.outcome == outcome
    assert "231" in result.reason
    assert result.fix is not None
    assert result.fix.startswith("pad intermediate_size to 29696, or ")
    wider = {**QWEN_72B_INT4, "intermediate_size": 29696}
    assert only(wider, engine, 2).outcome == "ok"


def test_the_card_and_the_dtype_decide_what_a_cut_group_does_on_vllm() -> None:
    bfloat16 = {**QWEN_72B_INT4, "torch_dtype": "bfloat16"}
    hopper = {**bfloat16, "compute_capability": "9.0"}
    assert only(bfloat16, "vllm", 2).outcome == "error"
    assert only(hopper, "vllm", 2).outcome == "late_error"
    text = only(hopper, "vllm", 8).error_text
    assert text is not None
    assert "MacheteLinearKernel cannot implement due to: Input features size must" in text


def test_fp8_experts_are_refined_by_vllm_and_refused_by_sglang() -> None:
    vllm, sglang = (only(QWEN_30B_FP8, name, 4) for name in ("vllm", "sglang"))
    assert (vllm.outcome, vllm.sizes["refined_block"]) == ("fallback", [64, 64])
    assert sglang.outcome == "error"
    assert sglang.fix is not None
    assert "pad moe_intermediate_size to 1024, or quantize in blocks or groups of 64" in sglang.fix
    assert vllm.legal_tp_sizes == (1, 2, 4, 8)
    assert sglang.legal_tp_sizes == (1, 2)


def test_gpt_oss_has_experts_for_sixteen_ranks_but_no_attention() -> None:
    result = only(GPT_OSS, "vllm", 16)
    assert (result.outcome, result.reason) == ("error", "integer modulo by zero")
    assert result.rule_id == "vllm.gpt_oss_kv"
    eight = only(GPT_OSS, "vllm", 8)
    assert eight.outcome == "pad"
    assert eight.sizes["per_rank_valid"] == [384] * 7 + [192]


def test_a_vision_tower_with_25_heads_refuses_four_ranks() -> None:
    tower = {**INTERN_VL["vision_config"], "model_type": "siglip_vision_model"}
    for engine in ("vllm", "sglang"):
        result = only({**INTERN_VL, "vision_config": tower}, engine, 4)
        assert result.part == "vision_config"
        assert result.reason == "vision_config: 25 is not divisible by 4"
        assert result.error_text == "25 is not divisible by 4"
        assert result.legal_tp_sizes == (1,)
    assert only(INTERN_VL["llm_config"], "vllm", 4).outcome == "ok"


def test_intern_vit_keeps_its_25_heads_whole_on_vllm_and_gets_dummy_heads_on_sglang() -> None:
    vllm, sglang = only(INTERN_VL, "vllm", 4), only(INTERN_VL, "sglang", 4)
    assert (vllm.outcome, vllm.part) == ("replicate", "vision_config")
    assert 8 in vllm.legal_tp_sizes
    assert 3 not in vllm.legal_tp_sizes  # 12800 / 3, and the decoder's heads
    assert (sglang.outcome, sglang.part) == ("pad", "vision_config")
    assert sglang.sizes["vision_config"]["heads"]["padded_heads"] == 28


def test_a_tower_of_transformers_own_is_whole_on_every_rank() -> None:
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 1280, "encoder_attention_heads": 20}
    decoder = {"model_type": "qwen2", "num_attention_heads": 32, "num_key_value_heads": 32}
    config = {"model_type": "qwen2_audio", "text_config": decoder, "audio_config": audio}
    for engine in ("vllm", "sglang"):
        result = only(config, engine, 8)
        assert result.outcome == "ok"
        assert result.sizes["audio_config"] == {"whole": True}
    whole = only(INTERN_VL, "tensorrt-llm", 4)
    assert whole.outcome == "ok"
    assert "this engine keeps towers whole" in whole.notes


def test_a_decoder_beside_its_tower_is_read_from_the_top() -> None:
    flat = {**INTERN_VL["llm_config"], "vision_config": {"depth": 32, "num_heads": 16}}
    result = only(flat, "sglang", 5)
    assert result.outcome == "error"
    assert result.part in ("", "vision_config")
    assert only(flat, "sglang", 8).outcome == "ok"


def test_heads_are_padded_with_the_blocks_in_mind() -> None:
    # sgl-project/sglang#8243: 66 heads of 64 on six ranks are 704 rows each, not whole blocks
    config = {
        "num_attention_heads": 64,
        "head_dim": 64,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    result = only(config, "sglang", 6)
    assert result.fix is not None
    assert result.fix.startswith("pad num_attention_heads to 72;")
    assert only({**config, "num_attention_heads": 72}, "sglang", 6).outcome == "ok"
    assert only({**config, "num_attention_heads": 66}, "sglang", 6).outcome == "error"


def test_scales_of_a_merged_layer_can_load_wrong_without_a_word() -> None:
    config = {
        "hidden_size": 1536,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "head_dim": 192,
        "v_head_dim": 128,
        "quant": "fp8",
        "weight_block_size": [128, 128],
        "tensor": "qkv_proj",
    }
    result = only(config, "vllm", 4)
    assert result.outcome == "silent_wrong"
    assert result.sizes["wrong_ranks"][0]["wrong"]["v"] == "64/128 rows use a wrong scale"


def test_an_unknown_architecture_is_planned_from_its_fields_and_says_so() -> None:
    result = only({"model_type": "brand_new", "num_attention_heads": 12}, "vllm", 4)
    assert result.outcome == "ok"
    assert result.notes[0] == (
        "model_type='brand_new' is not known: planned from the fields that are there"
    )
    assert "vllm.vocab not applied: vocab_size not given" in result.notes


def test_the_nearest_legal_degrees_stand_on_both_sides() -> None:
    result = only({"num_attention_heads": 28, "num_key_value_heads": 4}, "sglang", 8)
    assert result.nearest_legal_tp_sizes == (4, 28)


CANNOT_OPEN = (".formats", ".unknown_class", ".architecture")
"""Rules of engines that load such a checkpoint at no degree at all."""


def test_a_hundred_real_configs_are_planned_by_every_engine_at_every_degree() -> None:
    path = Path(__file__).parents[1] / "data" / "model_configs.json"
    models = json.loads(path.read_text(encoding="utf-8"))
    assert len({model["name"] for model in models}) == 100
    for model in models:
        assert model["source"]
        results = plan(model["config"], tp_sizes=range(1, 17))
        assert len(results) == 16 * len(ENGINE_NAMES)
        read = [one for one in results if not (one.rule_id or "").endswith(CANNOT_OPEN)]
        assert len(read) >= 16, model["name"]
        assert all(result.is_legal for result in read if result.tp_size == 1), model["name"]
        refused = [result for result in results if not result.is_legal]
        assert refused, model["name"]
        assert all(result.fix for result in refused), model["name"]


def test_every_rule_has_a_source_and_every_engine_a_version() -> None:
    for engine in map(engine_named, ENGINE_NAMES):
        assert engine.version
        for rule in engine.rules:
            assert rule.source, rule.rule_id
            assert "." in rule.rule_id


# -- how it is called


def test_config_may_be_a_file_or_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI_4))
    expected = plan(PHI_4, "vllm", (2, 4))
    assert plan(tmp_path, "vllm", (2, 4)) == expected
    assert plan(str(tmp_path / "config.json"), "vllm", (2, 4)) == expected


def test_results_come_engine_by_engine_in_the_order_asked_for() -> None:
    found = [(one.engine, one.tp_size) for one in plan(PHI_4, ("tgi", "vllm"), (4, 2))]
    assert found == [("tgi", 4), ("tgi", 2), ("vllm", 4), ("vllm", 2)]
    assert [one.engine for one in plan(PHI_4, tp_sizes=2)] == list(ENGINE_NAMES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads": "32"},
            "config: num_attention_heads='32', but should be a whole number of at least 1",
        ),
        (
            {"hidden_size": True},
            "config: hidden_size=True, but should be a whole number of at least 1",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "config: quantization_config: weight_block_size=[128], but should be two whole numbers"
            " of at least 1",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "config: quantization_config.quant_method=None, but should be the name of a method",
        ),
        ({"text_config": 7}, "config: text_config=7, but should be an object of fields"),
        (
            {"vision_config": {"num_heads": 1.5}},
            "vision_config: num_heads=1.5, but should be a whole number of at least 1",
        ),
        (
            {"tensor": "nonsense"},
            "config: tensor='nonsense', but should be one of qkv_proj, o_proj, gate_up_proj,"
            " down_proj, lm_head, experts",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:40],
)
def test_a_malformed_config_is_one_error_that_names_the_field(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError) as error:
        plan(fields)
    assert str(error.value) == message


def test_a_file_that_is_no_config_is_a_plan_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, said in (("[1]", "a list, but should be an object of fields"), ("{", "is not JSON")):
        path.write_text(text)
        with pytest.raises(PlanError, match=said):
            plan(path)
    with pytest.raises(PlanError, match="cannot be read"):
        plan(tmp_path / "absent.json")


def test_what_is_no_config_at_all_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="config: a list, but should be fields, a ModelSpec or"):
        plan([1])  # type: ignore[arg-type]


def test_an_unknown_engine_or_degree_is_named() -> None:
    with pytest.raises(TPCheckError) as error:
        plan(PHI_4, "vlm")
    assert str(error.value) == f"engine='vlm', but should be one of {', '.join(ENGINE_NAMES)}"
    for degree in (0, True, 2.0):
        with pytest.raises(TPCheckError, match=r"tp_size=.* but should be a whole number"):
            plan(PHI_4, "vllm", (degree,))  # type: ignore[arg-type]


def test_a_plan_loads_no_torch() -> None:
    code = (
        "import sys, tpcheck\n"
        f"found = tpcheck.plan({PHI_4!r}, tp_sizes=(1, 2, 4))\n"
        "assert len(found) == 36\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_fragment_without_heads_is_planned_at_once():
    results = plan({"hidden_size": 4096, "intermediate_size": 11008}, tp_sizes=(2, 3, 8))
    assert {one.tp_size for one in results if one.engine == "reference"} == {2, 3, 8}
    outcomes = {one.tp_size: one.outcome for one in results if one.engine == "reference"}
    assert outcomes[2] == outcomes[8] == "ok"
    assert outcomes[3] == "error", "11008 does not divide by 3"
