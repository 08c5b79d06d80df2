"""gpt-oss in the reference decoder: the function, its split, its checkpoint, its faults."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from safetensors.torch import load_file, save_file

import tpcheck
from tests.groups import single_group
from tests.models import GPT_OSS_CONFIG
from tests.reference_jobs import Reply, Run, ids_for, on_ranks, relative_rms, unmoved_weights
from tpcheck.errors import SubjectError
from tpcheck.faults import FAULTS, gpt_oss
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.hf.config import spec_from_config
from tpcheck.records import FAIL
from tpcheck.reference.checkpoint import load_decoder
from tpcheck.reference.decoder import build_decoder
from tpcheck.reference.expert_names import expert_stored
from tpcheck.reference.rope import attention_factor, inverse_frequencies
from tpcheck.shard_plan import SplitPolicy, costs, legal_tp_sizes, make_shard_plan
from tpcheck.sharding import tiling_problems
from tpcheck.spec import ModelSpec, RopeScaling
from tpcheck.strategies import model_specs

YARN = RopeScaling("yarn", 32.0, original_max_position_embeddings=16, truncate=False)
GPT_OSS = spec_from_config(GPT_OSS_CONFIG)
SPECS = {
    "gpt_oss": GPT_OSS,
    "clamped": replace(GPT_OSS, swiglu_limit=0.25, swiglu_alpha=1.1),
    "one_kv_head": replace(GPT_OSS, num_key_value_heads=1, layer_types=()),
    "dense": replace(
        GPT_OSS,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        router_bias=False,
        swiglu_limit=0.25,
    ),
}
CASES = [(name, size) for name, spec in SPECS.items() for size in legal_tp_sizes(spec, 8)[1:]]


@pytest.fixture(scope="module")
def whole() -> dict[str, Reply]:
    """Every spec at TP=1."""
    return {name: on_ranks(Run(spec, ids_for(spec)), 1)[0] for name, spec in SPECS.items()}


# the function


def test_a_token_gets_what_its_chosen_experts_give_it() -> None:
    for name in ("gpt_oss", "clamped"):
        spec = SPECS[name]
        mlp = build_decoder(spec, single_group()).layers[0].mlp
        x = 3 * torch.randn(2, 5, spec.hidden_size, dtype=torch.float64)
        expected = torch.stack([torch.stack([one_token(mlp, spec, t) for t in row]) for row in x])
        assert relative_rms(mlp(x), expected) < 1e-14


def one_token(mlp: Any, spec: ModelSpec, x: torch.Tensor) -> torch.Tensor:
    """What the model card says, token by token, from the weights alone."""
    scores = mlp.gate.weight_ED @ x + mlp.gate.bias_E
    chosen = sorted(range(spec.num_experts), key=lambda e: -scores[e])[: spec.num_experts_per_tok]
    total = sum(math.exp(scores[e]) for e in chosen)
    y = torch.zeros_like(x)
    for e in chosen:
        expert, features = mlp.experts[e], []
        gates = expert.gate_proj.weight_fD @ x + expert.gate_proj.bias_f
        ups = expert.up_proj.weight_fD @ x + expert.up_proj.bias_f
        for gate, up in zip(gates.tolist(), ups.tolist(), strict=True):
            gate = min(gate, spec.swiglu_limit)
            up = min(max(up, -spec.swiglu_limit), spec.swiglu_limit)
            features.append((up + 1) * gate / (1 + math.exp(-spec.swiglu_alpha * gate)))
        down = expert.down_Df @ torch.tensor(features, dtype=x.dtype) + expert.bias_D
        y += math.exp(scores[e]) / total * down
    return y


def test_a_sink_takes_weight_and_gives_nothing() -> None:
    spec = replace(GPT_OSS, num_hidden_layers=1, position="learned", rope_scaling=None)
    attention = build_decoder(spec, single_group()).layers[0].self_attn
    x = torch.randn(1, 5, spec.hidden_size, dtype=torch.float64)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (projection(x)[0].view(5, -1, 4) for projection in projections)
    heads = []
    for head, sink in enumerate(attention.sinks_h.tolist()):
        kv = head // 12
        for t in range(5):
            seen = range(max(0, t - 2), t + 1)
            weights = [math.exp(float(q[t, head] @ k[s, kv]) / 2) for s in seen]
            total = sum(weights) + math.exp(sink)
            heads.append(sum(w / total * v[s, kv] for w, s in zip(weights, seen, strict=True)))
    y = torch.stack(heads).view(24, 5, 4).transpose(0, 1).flatten(1)
    expected = y @ attention.o_proj.weight_Df.T + attention.o_proj.bias_D
    assert relative_rms(attention(x)[0], expected) < 1e-14


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_stretches_slow_ones_and_blends_between(truncate: bool) -> None:
    """Of 32 pairs over 1024 positions: place(32 turns) = 5.66..., place(1 turn) = 17.70..."""
    scaling = RopeScaling(
        "yarn", 8.0, original_max_position_embeddings=1024, truncate=truncate, beta_fast=32.0
    )
    spec = replace(GPT_OSS, head_dim=64, rope_theta=10000.0, rope_scaling=scaling)
    plain = inverse_frequencies(replace(spec, rope_scaling=None))
    ratio = (inverse_frequencies(spec) / plain).tolist()
    turns = (1024 * plain / (2 * math.pi)).tolist()
    first, last = (5, 18) if truncate else (5.6564, 17.6971)
    for pair, actual in enumerate(ratio):
        share = min(max((pair - first) / (last - first), 0), 1)
        assert actual == pytest.approx(1 - share + share / 8, rel=1e-4), pair
        assert turns[pair] < 32 or actual == 1 or truncate
        assert turns[pair] > 1 or actual == pytest.approx(1 / 8, rel=1e-12) or truncate


def test_yarn_sharpens_by_the_logarithm_of_its_factor() -> None:
    assert attention_factor(YARN) == pytest.approx(0.1 * math.log(32) + 1, rel=1e-15)
    assert attention_factor(replace(YARN, attention_factor=1.25)) == 1.25
    assert attention_factor(replace(YARN, factor=0.5)) == 1.0
    assert attention_factor(RopeScaling("linear", 8.0)) == attention_factor(None) == 1.0


def test_a_kind_of_layer_is_a_model_with_or_without_the_window() -> None:
    one, ids = replace(GPT_OSS, num_hidden_layers=1), ids_for(GPT_OSS)

    def logits(**fields: Any) -> torch.Tensor:
        return build_decoder(replace(one, **fields), single_group())(ids)

    sliding, full = (logits(layer_types=(f"{kind}_attention",)) for kind in ("sliding", "full"))
    assert torch.equal(sliding, logits(layer_types=()))
    assert torch.equal(full, logits(layer_types=(), sliding_window=0))
    assert relative_rms(sliding, full) > 1e-3


def test_every_layer_looks_back_as_far_as_its_kind_says() -> None:
    x = torch.randn(1, 6, GPT_OSS.hidden_size, dtype=torch.float64)
    moved = torch.cat((x[:, :1] + 1, x[:, 1:]), dim=1)
    heard = []
    for layer in build_decoder(GPT_OSS, single_group()).layers:
        attention = layer.self_attn
        changed = (attention(moved) != attention(x)).any(-1)[0]
        heard.append(int(changed.nonzero().max()))
    assert heard == [2, 5, 2]  # the first of 6 tokens, with a window of 3 in every other layer


@pytest.mark.parametrize("name", SPECS)
def test_every_weight_moves_the_logits(name: str) -> None:
    spec = replace(SPECS[name], num_experts_per_tok=SPECS[name].num_experts)
    decoder, ids = build_decoder(spec, single_group()), ids_for(spec)
    assert unmoved_weights(decoder, ids) == []


# the split


@pytest.mark.parametrize(("name", "size"), CASES)
def test_every_degree_is_the_same_function(whole: dict[str, Reply], name: str, size: int) -> None:
    spec = SPECS[name]
    replies = on_ranks(Run(spec, ids_for(spec), poison=True), size)
    for reply in replies:
        assert torch.equal(reply.logits, replies[0].logits)
        assert relative_rms(reply.logits, whole[name].logits) < 1e-12
        assert relative_rms(reply.decoded, whole[name].logits) < 1e-12
        assert Counter(reply.collectives) == {"all_reduce": 7, "all_gather": 1}
    for weight, (expected, _) in whole[name].shards.items():
        entries = [reply.shards[weight] for reply in replies]
        locals_, placements = [entry[0] for entry in entries], [entry[1] for entry in entries]
        assert tiling_problems(expected.shape, placements, locals_, expected) == [], weight


def test_sinks_go_with_their_heads_where_heads_are_padded(whole: dict[str, Reply]) -> None:
    policy = SplitPolicy(heads="pad", kv="unaligned", intermediate="pad")
    run = Run(GPT_OSS, ids_for(GPT_OSS), policy=policy)
    replies = on_ranks(run, 5)
    held = [reply.shards["model.layers.0.self_attn.sinks"][0] for reply in replies]
    assert [len(sinks) for sinks in held] == [5] * 5
    expected = whole["gpt_oss"].shards["model.layers.0.self_attn.sinks"][0]
    assert torch.equal(torch.cat(held), torch.cat((expected, torch.zeros(1))))
    poisoned = Job("tests.reference_jobs:logits_job", replace(run, poison=True), 5)
    (result,) = SimulatedRanks().run([poisoned])
    for logits in (*result.replies, *(reply.logits for reply in replies)):
        assert relative_rms(logits, whole["gpt_oss"].logits) < 1e-12


def test_costs_count_what_the_ranks_hold() -> None:
    for size in (1, 4):
        plan = make_shard_plan(GPT_OSS, size)
        replies = on_ranks(Run(GPT_OSS, ids_for(GPT_OSS)), size)
        for cost, reply in zip(costs(GPT_OSS, plan), replies, strict=True):
            assert cost.parameters == sum(local.numel() for local, _ in reply.shards.values())


GENERATED = model_specs(
    (2, 4),
    legal=True,
    max_layers=2,
    max_heads=16,
    attention_sinks=True,
    num_experts=4,
    num_experts_per_tok=2,
    router_bias=True,
    router_scoring="topk_softmax",
    quantization=None,
)


@settings(max_examples=25, database=None, phases=[Phase.generate], derandomize=True, deadline=None)
@given(GENERATED)
def test_generated_specs_are_the_same_function_at_every_degree(spec: ModelSpec) -> None:
    run = Run(spec, ids_for(spec))
    jobs = [Job("tests.reference_jobs:logits_job", run, size) for size in (1, 2, 4)]
    (expected,), *sharded = (result.replies for result in SimulatedRanks().run(jobs))
    for replies in sharded:
        for logits in replies:
            assert relative_rms(logits, expected) < 1e-12


@pytest.mark.parametrize(
    "pins",
    [
        {"layer_types": ("sliding_attention", "full_attention")},
        {"layer_types": ["full_attention"]},
        {"swiglu_limit": 7.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
)
def test_a_pinned_field_brings_what_it_needs(pins: dict[str, Any]) -> None:
    @settings(max_examples=20, database=None, phases=[Phase.generate], derandomize=True)
    @given(model_specs(4, legal=True, **pins))
    def has_it(spec: ModelSpec) -> None:
        ((name, value),) = pins.items()
        assert getattr(spec, name) == getattr(replace(spec, **pins), name)
        assert value

    has_it()


# the checkpoint


def save_checkpoint(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Write logical weights as gpt-oss stores them: [in, out], gate and up feature by feature."""
    stored = {
        name.replace(".mlp.gate.", ".mlp.router."): weight
        for name, weight in weights.items()
        if ".experts." not in name
    }
    for layer in range(GPT_OSS.num_hidden_layers):
        where = f"model.layers.{layer}.mlp.experts"
        for leaf, ending in (("weight", ""), ("bias", "_bias")):
            gates, ups, downs = (
                torch.stack([weights[f"{where}.{e}.{part}_proj.{leaf}"].mT for e in range(8)])
                if leaf == "weight"
                else torch.stack([weights[f"{where}.{e}.{part}_proj.{leaf}"] for e in range(8)])
                for part in ("gate", "up", "down")
            )
            stored[f"{where}.gate_up_proj{ending}"] = torch.stack((gates, ups), -1).flatten(-2)
            stored[f"{where}.down_proj{ending}"] = downs
    whole = {name: weight.contiguous() for name, weight in stored.items()}
    save_file(whole, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(GPT_OSS_CONFIG))
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Reply]) -> Path:
    weights = {name: local for name, (local, _) in whole["gpt_oss"].shards.items()}
    return save_checkpoint(tmp_path_factory.mktemp("gpt_oss"), weights)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_directory_reads_as_the_weights_it_was_made_of(
    whole: dict[str, Reply], checkpoint: Path, size: int
) -> None:
    from_disk = on_ranks(Run(checkpoint, ids_for(GPT_OSS)), size)
    generated = on_ranks(Run(GPT_OSS, ids_for(GPT_OSS)), size)
    for reply, expected in zip(from_disk, generated, strict=True):
        assert torch.equal(reply.logits, expected.logits)
        assert set(reply.shards) == set(expected.shards)
        for name, (local, placement) in expected.shards.items():
            assert torch.equal(reply.shards[name][0], local), name
            assert reply.shards[name][1] == placement
            assert reply.shards[name][0].is_contiguous(), name


def test_a_rank_reads_the_pairs_of_its_features_and_nothing_else() -> None:
    stored = expert_stored(GPT_OSS, ())
    gate = stored["model.layers.1.mlp.experts.5.gate_proj.weight"]
    assert (gate.name, gate.index) == ("model.layers.1.mlp.experts.gate_up_proj", 5)
    assert gate.stored_shape((24, 48)) == (8, 48, 48)
    assert gate.locate((24, 48), 0, 6, 12) == (1, 12, 24)
    assert gate.own(1) == (slice(None), slice(0, None, 2))
    up = stored["model.layers.1.mlp.experts.5.up_proj.bias"]
    assert up.stored_shape((24,)) == (8, 48)
    assert (up.locate((24,), 0, 6, 12), up.own(0)) == ((0, 12, 24), (slice(1, None, 2),))
    down = stored["model.layers.1.mlp.experts.5.down_proj.weight"]
    assert down.stored_shape((48, 24)) == (8, 24, 48)
    assert (down.locate((48, 24), 1, 6, 12), down.own(0)) == ((0, 6, 12), ())
    assert stored["model.layers.1.mlp.gate.bias"].name == "model.layers.1.mlp.router.bias"


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ("drop", "1 tensor missing: model.layers.0.self_attn.sinks"),
        (
            "turn",
            "model.layers.0.mlp.experts.down_proj: shape=[8, 48, 24], but config.json makes it",
        ),
        ("add", "1 tensor that config.json gives no use for: model.layers.0.mlp.gate.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    checkpoint: Path, tmp_path: Path, change: str, phrase: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    down = "model.layers.0.mlp.experts.down_proj"
    if change == "drop":
        del tensors["model.layers.0.self_attn.sinks"]
    elif change == "turn":
        tensors[down] = tensors[down].mT.contiguous()
    else:
        tensors["model.layers.0.mlp.gate.bias"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_CONFIG))
    with pytest.raises(SubjectError) as error:
        load_decoder(tmp_path, single_group())
    assert phrase in str(error.value)


# faults

FIRST = {
    "sinks_of_first_heads": "layers.0.self_attn",
    "sinks_dropped": "layers.0.self_attn",
    "interleaved_experts_as_halves": "layers.0.mlp.experts",
    "router_bias_per_rank": "layers.0.mlp.gate",
    "layer_types_ignored": "layers.0.self_attn",
    "yarn_not_found": "layers.0.self_attn",
}
"""The module in which each fault shows first."""


def failed_checks(verdict: Any) -> set[str]:
    return {name for name, found in verdict.checks.items() if found.outcome == FAIL}


def test_every_fault_of_the_family_is_here_and_names_its_thread() -> None:
    ours = {name for name, fault in FAULTS.items() if fault.plant.__module__ == gpt_oss.__name__}
    assert ours == set(FIRST)
    assert all(FAULTS[name].thread for name in ours)


@pytest.mark.parametrize("name", FIRST)
def test_a_fault_is_caught_by_the_check_that_names_it(name: str) -> None:
    fault = FAULTS[name]
    report = tpcheck.run(f"builtin:gpt-oss-tiny+{name}", (2, 4), backend="sim", confirm=False)
    assert [verdict.tp_size for verdict in report.verdicts] == [2, 4]
    for verdict in report.verdicts:
        failed = failed_checks(verdict)
        assert fault.caught_by in failed
        assert "drift" in failed or not fault.drift
        assert verdict.outcome == "WRONG"
        assert verdict.first_divergence.fqn.startswith(FIRST[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_builtin_passes(dtype: str) -> None:
    report = tpcheck.run("builtin:gpt-oss-tiny", (2, 4, 8), backend="sim", dtypes=(dtype,))
    assert len(report.verdicts) == 3
    for verdict in report.verdicts:
        assert (verdict.outcome, failed_checks(verdict)) == ("PASS", set())
        assert verdict.checks["structural"].facts["relative_rms"] < 1e-14
