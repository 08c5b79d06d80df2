"""A mixture of experts in the reference decoder: the function, its split, its faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

import tpcheck
from tests.groups import single_group
from tests.reference_jobs import Reply, Run, alone, ids_for, on_ranks, relative_rms, unmoved_weights
from tpcheck.faults import FAULTS, moe
from tpcheck.records import FAIL
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.weights import GeneratedWeights
from tpcheck.sharding import tiling_problems, unshard
from tpcheck.spec import ModelSpec

DENSE = ModelSpec(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=24,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=32,
)
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTRAL = replace(DENSE, **EXPERTS, norm_topk_prob=True)
SPECS = {
    "mixtral": MIXTRAL,
    "not_renormalized": replace(DENSE, **EXPERTS),
    "one_of_many": replace(DENSE, **{**EXPERTS, "num_experts": 16, "num_experts_per_tok": 1}),
    "all_of_three": replace(DENSE, **{**EXPERTS, "num_experts": 3, "num_experts_per_tok": 3}),
    "shared": replace(DENSE, **EXPERTS, shared_expert_intermediate_size=48),
    "biases": replace(MIXTRAL, mlp_bias=True, shared_expert_intermediate_size=24),
}
DEGREES = (2, 3, 4, 8)
CASES = [(name, size) for name in SPECS for size in DEGREES]


@pytest.fixture(scope="module")
def whole() -> dict[str, Reply]:
    """Every spec at TP=1."""
    return alone(SPECS)


# the function


@pytest.mark.parametrize("name", SPECS)
def test_a_token_gets_what_its_chosen_experts_give_it(name: str) -> None:
    spec = SPECS[name]
    mlp = build_decoder(spec, single_group()).layers[0].mlp
    x = torch.randn(2, 5, spec.hidden_size, dtype=torch.float64)
    expected = torch.stack([torch.stack([one_token(mlp, spec, t) for t in row]) for row in x])
    assert relative_rms(mlp(x), expected) < 1e-14


def one_token(mlp: Any, spec: ModelSpec, x: torch.Tensor) -> torch.Tensor:
    """What the paper says, token by token, from the weights alone."""
    scores = (mlp.gate.weight_ED @ x).exp()
    scores = scores / scores.sum()
    chosen = sorted(range(spec.num_experts), key=lambda e: -scores[e])[: spec.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if spec.norm_topk_prob else 1.0
    y = torch.zeros_like(x)
    for e in chosen:
        y += scores[e] / total * one_expert(mlp.experts[e], x)
    if spec.shared_expert_intermediate_size:
        share = 1 / (1 + (-(mlp.shared_gate_1D @ x)).exp())
        y += share * one_expert(mlp.shared_expert, x)
    return y


def one_expert(expert: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = expert.gate_proj.weight_fD @ x, expert.up_proj.weight_fD @ x
    if expert.gate_proj.bias_f is not None:
        gate, up = gate + expert.gate_proj.bias_f, up + expert.up_proj.bias_f
    y = expert.down_Df @ (functional.silu(gate) * up)
    return y if expert.bias_D is None else y + expert.bias_D


class DenseWeights(GeneratedWeights):
    """The MLP's weights under the names of the one expert there is."""

    def slice(self, name: str, *where: Any) -> torch.Tensor:
        return super().slice(name.replace(".experts.0.", "."), *where)


def test_one_expert_is_the_dense_model() -> None:
    one = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
    tp = single_group()
    sparse = build_decoder(replace(DENSE, **one), tp, DenseWeights(tp))
    dense = build_decoder(DENSE, single_group())
    ids = ids_for(DENSE)
    assert relative_rms(sparse(ids), dense(ids)) < 1e-14


def test_an_expert_that_no_token_chose_is_not_heard() -> None:
    spec = replace(SPECS["one_of_many"], num_hidden_layers=1)
    decoder, ids = build_decoder(spec, single_group()), ids_for(spec, 2)
    shares: list[torch.Tensor] = []
    handle = decoder.layers[0].mlp.gate.register_forward_hook(lambda *a: shares.append(a[2]))
    before = decoder(ids)
    handle.remove()
    idle = (shares[0] == 0).all(0).all(0).nonzero().flatten().tolist()
    assert 12 <= len(idle) < 16
    for index in idle:
        for parameter in decoder.layers[0].mlp.experts[index].parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(decoder(ids), before)


def test_probabilities_are_taken_in_float32_and_shares_are_the_models_dtype() -> None:
    gate = build_decoder(MIXTRAL, single_group(dtype=torch.bfloat16)).layers[0].mlp.gate
    x = torch.randn(2, 5, 48).bfloat16()
    scores = (x @ gate.weight_ED.T).float().softmax(-1)
    top = scores.topk(2, -1)
    expected = (top.values / top.values.sum(-1, keepdim=True)).bfloat16()
    shares = gate(x)
    assert shares.dtype == torch.bfloat16
    assert torch.equal(shares.gather(-1, top.indices), expected)
    assert (shares != 0).sum() == 2 * 5 * 2


@pytest.mark.parametrize("name", ["mixtral", "shared", "biases"])
def test_every_weight_moves_the_logits(name: str) -> None:
    spec = SPECS[name]
    decoder, ids = build_decoder(spec, single_group()), ids_for(spec, 32)
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


@pytest.mark.parametrize(("name", "size"), [("mixtral", 2), ("shared", 3), ("biases", 8)])
def test_placements_say_where_weights_and_activations_are(
    whole: dict[str, Reply], name: str, size: int
) -> None:
    spec = SPECS[name]
    replies = on_ranks(Run(spec, ids_for(spec)), size)
    assert set(replies[0].shards) == set(logical_tensors(spec)) == set(whole[name].shards)
    for weight, (expected, _) in whole[name].shards.items():
        entries = [reply.shards[weight] for reply in replies]
        locals_, placements = [entry[0] for entry in entries], [entry[1] for entry in entries]
        assert tiling_problems(expected.shape, placements, locals_, expected) == [], weight
    for fqn, (_, expected, _, _) in whole[name].points.items():
        points = [reply.points[fqn] for reply in replies]
        actual = unshard([p[1] for p in points], [p[3] for p in points], expected.shape)
        assert relative_rms(actual, expected) < 1e-12, fqn


@pytest.mark.parametrize("name", SPECS)
def test_trace_points_are_declared_in_order_of_execution(name: str) -> None:
    spec = SPECS[name]
    decoder = build_decoder(spec, single_group())
    order: list[str] = []
    for fqn, (module, _, _) in decoder.trace_points.items():
        module.register_forward_hook(lambda *_, fqn=fqn: order.append(fqn))
        assert dict(decoder.named_modules())[fqn] is module
    decoder(ids_for(spec))
    assert order == list(decoder.trace_points)
    shared = spec.shared_expert_intermediate_size > 0
    assert [fqn for fqn in order if ".0.mlp" in fqn] == [
        "layers.0.mlp.gate",
        "layers.0.mlp.experts",
        *["layers.0.mlp.shared_expert"] * shared,
        "layers.0.mlp",
    ]


@pytest.mark.parametrize("name", SPECS)
def test_routed_and_shared_experts_have_one_all_reduce(name: str) -> None:
    spec = SPECS[name]
    for reply in on_ranks(Run(spec, ids_for(spec)), 4):
        assert Counter(reply.collectives) == {
            "all_reduce": 1 + 2 * spec.num_hidden_layers,
            "all_gather": 1,
        }


# faults

BASE = replace(DENSE, num_attention_heads=12, num_hidden_layers=2)
FIRST = {
    "shared_expert_reduced_twice": "layers.0.mlp.shared_expert",
    "shared_expert_not_reduced": "layers.0.mlp.experts",
    "replicated_shared_expert": "layers.0.mlp.shared_expert",
    "shared_expert_of_other_tokens": "layers.0.mlp.shared_expert",
    "packed_experts_contiguous": "layers.0.mlp.experts",
    "experts_of_rank_0": "layers.0.mlp.experts",
    "experts_of_half_the_group": "layers.0.mlp",
    "expert_bias_times_tp": "layers.0.mlp.experts",
    "router_of_one_rank": "layers.0.mlp.gate",
    "zeroed_expert_ids": "layers.0.mlp.gate",
    "shares_not_renormalized": "layers.0.mlp.gate",
    "raw_logit_shares": "layers.0.mlp.gate",
}
"""The module in which each fault shows first."""


def run_spec(spec: ModelSpec, tp_sizes: tuple[int, ...], plant: Any = None, **options: Any) -> Any:
    @tpcheck.subject(spec=spec, seq_len=16)
    def build(tp: tpcheck.TPGroup) -> Decoder:
        decoder = build_decoder(spec, tp)
        if plant is not None and tp.size > 1:
            plant(decoder, tp)
        return decoder

    return tpcheck.run(build, tp_sizes, backend="sim", confirm=False, **options)


def failed_checks(verdict: Any) -> set[str]:
    return {name for name, found in verdict.checks.items() if found.outcome == FAIL}


def test_every_fault_of_the_family_is_here_and_names_its_thread() -> None:
    ours = {name for name, fault in FAULTS.items() if fault.plant.__module__ == moe.__name__}
    assert ours == set(FIRST)
    assert all(FAULTS[name].thread for name in ours)


@pytest.mark.parametrize("name", FIRST)
def test_a_fault_of_experts_is_caught_by_the_check_that_names_it(name: str) -> None:
    fault = FAULTS[name]
    report = run_spec(replace(BASE, **fault.needs), (2, 3), fault.plant)
    assert [verdict.tp_size for verdict in report.verdicts] == [2, 3]
    for verdict in report.verdicts:
        failed = failed_checks(verdict)
        assert fault.caught_by in failed
        assert "drift" in failed or not fault.drift
        assert verdict.outcome == "WRONG"
        assert verdict.first_divergence.fqn == FIRST[name]


@pytest.mark.parametrize(("name", "dtype"), [("shared", "bfloat16"), ("biases", "float16")])
def test_clean_experts_pass(name: str, dtype: str) -> None:
    report = run_spec(SPECS[name], DEGREES, dtypes=(dtype,), seed=11)
    assert len(report.verdicts) == 4
    for verdict in report.verdicts:
        assert (verdict.outcome, failed_checks(verdict)) == ("PASS", set())
        assert verdict.checks["structural"].facts["relative_rms"] < 1e-14


@pytest.mark.parametrize("name", ["mixtral-tiny", "qwen2-moe-tiny"])
def test_builtin_experts_pass(name: str) -> None:
    assert tpcheck.run(f"builtin:{name}", (4,), backend="sim").outcome == "PASS"
