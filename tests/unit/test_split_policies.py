"""Padded, uneven and copied splits: what the plan says, and that it is the same function."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

import tpcheck
from tests import reference_jobs
from tests.groups import single_group
from tests.reference_jobs import ids_for, relative_rms
from tpcheck.errors import IllegalDegreeError, PlanError, TPCheckError
from tpcheck.groups.jobs import Job
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import (
    STRICT,
    SplitPolicy,
    best_plan,
    fused_cut,
    imbalance,
    legal_tp_sizes,
    logical_tensors,
    make_shard_plan,
    tensor_cuts,
)
from tpcheck.shard_plan.cuts import attended_places, counted_places, held_heads, local_size
from tpcheck.shard_plan.planning import HEAD_ORDER
from tpcheck.shard_plan.policy import KV_WAYS, WAYS
from tpcheck.sharding import shard, tiling_problems, unshard
from tpcheck.spec import ModelSpec
from tpcheck.strategies import model_specs, split_policies

PAD = SplitPolicy(heads="pad", intermediate="pad")
UNEVEN = SplitPolicy(heads="uneven", intermediate="uneven")
UNALIGNED = SplitPolicy(kv="unaligned")
MHA = SplitPolicy(kv="mha")


def spec_of(heads: int, kv_heads: int = 0, **fields: Any) -> ModelSpec:
    sizes = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 48, "head_dim": 4}
    return ModelSpec.from_fields(
        {
            **sizes,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads or heads,
            "max_position_embeddings": 16,
            **fields,
        }
    )


# What the plan says.

HEADS = [
    # heads, kv, tp, policy, query heads (real) per rank, kv heads per rank, all per rank with pads
    (36, 36, 8, UNEVEN, [5, 5, 5, 5, 4, 4, 4, 4], [5, 5, 5, 5, 4, 4, 4, 4], 0),
    (36, 36, 8, PAD, [5] * 7 + [1], [5] * 7 + [1], 5),
    (25, 25, 4, PAD, [7, 7, 7, 4], [7, 7, 7, 4], 7),
    (28, 4, 8, PAD, [4, 3] * 4, [1] * 8, 4),
    (28, 4, 8, UNEVEN, [4, 3] * 4, [1] * 8, 0),
    (40, 10, 4, UNALIGNED, [10] * 4, [3, 3, 3, 3], 0),
    (40, 10, 4, MHA, [10] * 4, [3, 3, 3, 3], 0),
    (40, 10, 4, PAD, [12, 12, 12, 4], [3, 3, 3, 1], 12),
    (40, 10, 4, UNEVEN, [12, 12, 8, 8], [3, 3, 2, 2], 0),
    (12, 4, 6, UNALIGNED, [2] * 6, [1, 2, 1, 1, 2, 1], 0),
    (9, 3, 2, replace(UNEVEN, kv="unaligned"), [5, 4], [2, 2], 0),
    (9, 9, 2, UNEVEN, [5, 4], [5, 4], 0),
    (5, 5, 4, PAD, [2, 2, 1, 0], [2, 2, 1, 0], 2),
    (5, 5, 8, PAD, [1] * 5 + [0] * 3, [1] * 5 + [0] * 3, 1),
    (5, 5, 10, UNEVEN, [1] * 5 + [0] * 5, [1] * 5 + [0] * 5, 0),
    (3, 1, 8, UNEVEN, [1, 1, 1, 0, 0, 0, 0, 0], [1] * 8, 0),
    (14, 2, 3, replace(PAD, kv="unaligned"), [5, 5, 4], [1, 2, 1], 5),
]


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size", "policy", "queries", "kv", "all_"), HEADS)
def test_heads_go_to_ranks_as_counted_by_hand(
    heads: int,
    kv_heads: int,
    tp_size: int,
    policy: SplitPolicy,
    queries: list[int],
    kv: list[int],
    all_: int,
) -> None:
    plan = make_shard_plan(spec_of(heads, kv_heads), tp_size, policy)
    assert [rank.query_heads.size for rank in plan.ranks] == queries
    assert [rank.kv_heads.size for rank in plan.ranks] == kv
    assert plan.padded.query == all_
    assert sum(queries) == heads


BLOCKED = [(64, 128, 72), (64, 64, 66), (128, 128, 66), (64, 256, 72), (96, 128, 72), (64, 512, 96)]


@pytest.mark.parametrize(("head_dim", "block", "padded"), BLOCKED)
def test_heads_are_padded_to_whole_blocks_on_every_rank(
    head_dim: int, block: int, padded: int
) -> None:
    """64 heads of 64 at TP=6: 66 would cut blocks of 128, 72 is the least that does not."""
    spec = spec_of(64, head_dim=head_dim)
    plan = make_shard_plan(spec, 6, replace(PAD, block=block, intermediate="pad"))
    assert plan.padded.query * 6 == padded
    fewer = range(64, padded)
    assert not [n for n in fewer if n % 6 == 0 and n // 6 * head_dim % block == 0]


def test_widths_are_dealt_out_in_whole_blocks() -> None:
    """231 groups of 128 (Qwen2.5-72B int4): refused at TP=2, uneven 116 + 115, padded to 232."""
    spec = spec_of(8, head_dim=128, intermediate_size=29568)
    assert legal_tp_sizes(spec, 8, SplitPolicy(block=128)) == (1,)
    uneven = make_shard_plan(spec, 2, replace(UNEVEN, block=128))
    assert [rank.intermediate.size // 128 for rank in uneven.ranks] == [116, 115]
    padded = make_shard_plan(spec, 2, replace(PAD, block=128))
    assert padded.padded.intermediate * 2 == 29696


def test_a_vocabulary_is_padded_to_its_quantum_on_every_rank() -> None:
    spec = spec_of(8, vocab_size=50257)
    for tp_size, quantum, padded in [
        (8, 1, 50264),
        (8, 64, 50688),
        (4, 128, 50688),
        (1, 64, 50304),
    ]:
        plan = make_shard_plan(spec, tp_size, SplitPolicy(vocab_quantum=quantum))
        assert plan.padded_vocab_size == padded
        assert plan.vocab_rows * tp_size == padded
        assert sum(rank.vocab.size for rank in plan.ranks) == 50257


def refusal(spec: ModelSpec, tp_size: int, policy: SplitPolicy) -> str:
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(spec, tp_size, policy)
    return str(error.value)


def test_a_refusal_names_the_block_that_is_cut() -> None:
    assert refusal(spec_of(64, head_dim=64, intermediate_size=768), 4, SplitPolicy(block=384)) == (
        "layers.*.self_attn: num_attention_heads=64: rank 0 gets 1024 features,"
        " but should get whole blocks of 384 [llama, tp_size=4]\n"
        "  layers.*.self_attn: num_key_value_heads=64: rank 0 gets 1024 features,"
        " but should get whole blocks of 384\n"
        "  layers.*.mlp: intermediate_size=768: rank 0 gets 192 features,"
        " but should get whole blocks of 384\n"
        "  tp_size that fit this spec, up to 12: none"
    )
    two = spec_of(8, 2, head_dim=64, intermediate_size=256)
    assert "num_key_value_heads=2: rank 0 gets 64 features" in refusal(
        two, 2, SplitPolicy(block=128)
    )
    copies = refusal(two, 2, replace(MHA, block=128))
    assert "num_key_value_heads=2: copies of single heads are cut out, so head_dim=64" in copies
    # both KV heads of a block stay together, and the other rank computes with pads alone
    (load, *_) = imbalance(make_shard_plan(two, 2, replace(PAD, block=128)))
    assert load.padding == 2


def test_kv_heads_that_fit_neither_way_need_a_policy_for_kv() -> None:
    spec = spec_of(12, 4)
    for policy in (STRICT, PAD, UNEVEN):
        assert "num_key_value_heads=4, but should divide tp_size=6" in refusal(spec, 6, policy)
        for kv in ("unaligned", "mha"):
            assert make_shard_plan(spec, 6, replace(policy, kv=kv)).policy.kv == kv


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"heads": "odd"}, "policy: heads='odd', but should be one of even, pad, uneven"),
        ({"kv": "even"}, "policy: kv='even', but should be one of shard_or_replicate"),
        ({"intermediate": ""}, "policy: intermediate=''"),
        ({"block": 0}, "policy: block=0, but should be a whole number of at least 1"),
        ({"vocab_quantum": True}, "policy: vocab_quantum=True"),
    ],
)
def test_a_malformed_policy_is_named(fields: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        SplitPolicy(**fields)


def test_the_best_plan_is_the_first_that_runs_and_each_part_is_chosen_by_itself() -> None:
    def chosen(spec: ModelSpec, tp_size: int, **options: int) -> tuple[str, str, str]:
        policy = best_plan(spec, tp_size, **options).policy
        return policy.heads, policy.kv, policy.intermediate

    assert chosen(spec_of(8, 2), 4) == ("even", "shard_or_replicate", "even")
    assert chosen(spec_of(40, 10), 4) == ("even", "unaligned", "even")
    assert chosen(spec_of(28, 4), 8) == ("pad", "shard_or_replicate", "even")
    assert chosen(spec_of(14, 2), 3) == ("pad", "unaligned", "even")
    assert chosen(spec_of(8, 8, intermediate_size=50), 4) == ("even", "shard_or_replicate", "pad")
    # of 4 KV heads of 64, blocks of 128 hold two: TP=2 deals out whole blocks, evenly
    blocks = spec_of(8, 4, head_dim=64, intermediate_size=256)
    assert chosen(blocks, 2, block=128) == ("even", "shard_or_replicate", "even")
    assert best_plan(spec_of(8), 4, vocab_quantum=64).padded_vocab_size == 256


def test_where_nothing_can_run_each_way_says_why() -> None:
    with pytest.raises(IllegalDegreeError) as error:
        best_plan(spec_of(64, 2, head_dim=64, intermediate_size=128), 6, block=128)
    assert str(error.value) == (
        "tp_size=6, but should be one that some way to split allows [llama, tp_size=6]\n"
        "  layers.*.self_attn: num_attention_heads=64, but should be divisible by tp_size=6\n"
        "  layers.*.self_attn: num_key_value_heads=2: rank 3 begins at feature 64,"
        " but should begin at a block of 128\n"
        "  layers.*.self_attn: num_key_value_heads=2: rank 0 gets 64 features,"
        " but should get whole blocks of 128"
    )
    with pytest.raises(IllegalDegreeError, match="tp_size=0, but should be a whole number"):
        best_plan(spec_of(8), 0)


counts = st.integers(1, 9)


@settings(max_examples=300)
@given(data=st.data(), kv_heads=counts, group=counts, width=st.integers(1, 70), tp_size=counts)
def test_a_plan_covers_everything_meets_its_kv_heads_and_cuts_no_block(
    data: st.DataObject, kv_heads: int, group: int, width: int, tp_size: int
) -> None:
    spec = spec_of(kv_heads * group, kv_heads, intermediate_size=width)
    policy = data.draw(split_policies(spec, tp_size, legal=True, blocks=(1, 1, 2, 3, 8)))
    plan = make_shard_plan(spec, tp_size, policy)
    for total, spans in (
        (kv_heads * group, [rank.query_heads for rank in plan.ranks]),
        (width, [rank.intermediate for rank in plan.ranks]),
        (spec.vocab_size, [rank.vocab for rank in plan.ranks]),
    ):
        assert spans[0].start == 0
        assert spans[-1].stop == total
        assert all(left.stop == right.start for left, right in itertools.pairwise(spans))
    counted = []
    for rank, mine in enumerate(plan.ranks):
        held, places = held_heads(spec, plan, rank), attended_places(spec, plan, rank)
        assert len(places) == local_size(spec, plan, rank, "query")
        for head, place in zip(range(*mine.query_heads), places, strict=False):
            assert held[place] == head // group
        assert all(0 <= place < local_size(spec, plan, rank, "kv") for place in places)
        counted += [held[place] for place in counted_places(spec, plan, rank, "kv")]
        for split, unit in (("query", 4), ("kv", 4), ("intermediate", 1)):
            assert local_size(spec, plan, rank, split) * unit % policy.block == 0
        assert plan.vocab_rows % policy.vocab_quantum == 0
    assert counted == list(range(kv_heads)), "each real KV head counts once in a norm over all"
    for name, cuts in tensor_cuts(spec, plan).items():
        shape = logical_tensors(spec)[name].shape
        assert tiling_problems(shape, [one.placement for one in cuts]) == [], name


def test_planning_with_policies_loads_no_torch() -> None:
    code = (
        "import sys; from tpcheck.shard_plan import *; from tpcheck.spec import ModelSpec;"
        "spec = ModelSpec(64, 64, 64, 1, 5, head_dim=4);"
        "plan = best_plan(spec, 4); costs(spec, plan); imbalance(plan); tensor_cuts(spec, plan);"
        "import tpcheck.strategies; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Fused tensors.


@pytest.mark.parametrize("policy", [STRICT, PAD, UNEVEN, UNALIGNED, MHA], ids=str)
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
def test_a_fused_tensor_is_cut_by_its_parts(policy: SplitPolicy, names: tuple[str, ...]) -> None:
    spec = spec_of(12, 6, intermediate_size=13 if policy in (PAD, UNEVEN) else 24)
    plan = make_shard_plan(spec, 4, replace(policy, kv="unaligned") if policy == STRICT else policy)
    module = "self_attn" if "q_proj" in names else "mlp"
    parts = [logical_tensors(spec)[f"model.layers.0.{module}.{name}.weight"] for name in names]
    rows = sum(part.shape[0] for part in parts)
    fused = torch.arange(1, rows * 16 + 1).reshape(rows, 16)
    wholes = fused.split([part.shape[0] for part in parts])
    cuts = [fused_cut(spec, plan, rank, parts) for rank in range(4)]
    locals_ = []
    for rank, one in enumerate(cuts):
        pieces = []
        for part, whole in zip(parts, wholes, strict=True):
            mine = tensor_cuts(spec, plan)[_name_of(spec, part, names, module)][rank]
            piece = torch.zeros(mine.size, 16, dtype=fused.dtype)
            for local, there in mine.runs:
                piece[slice(*local)] = whole[slice(*there)]
            pieces.append(piece)
        expected = torch.cat(pieces)
        assert one.size == len(expected)
        actual = shard(fused, one.placement, rank, 4)
        if actual.numel():
            assert torch.equal(actual, expected[: len(actual)])
        assert not expected[len(actual) :].any(), "what a rank holds behind its last run is padding"
        locals_.append(expected)
    placements = [one.placement for one in cuts]
    assert torch.equal(unshard(locals_, placements, fused.shape), fused)


def _name_of(spec: ModelSpec, part: Any, names: tuple[str, ...], module: str) -> str:
    tensors = logical_tensors(spec)
    full = [f"model.layers.0.{module}.{name}.weight" for name in names]
    return next(name for name in full if tensors[name] == part)


def test_cutting_a_fused_tensor_as_one_would_give_rank_0_the_first_part_only() -> None:
    spec = spec_of(8, 2)
    plan = make_shard_plan(spec, 2)
    parts = [
        logical_tensors(spec)[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"
    ]
    cuts = [fused_cut(spec, plan, rank, parts) for rank in range(2)]
    assert [(tuple(local), tuple(whole)) for local, whole in cuts[1].runs] == [
        ((0, 16), (16, 32)),
        ((16, 20), (36, 40)),
        ((20, 24), (44, 48)),
    ]
    assert cuts[0].size == 24


# The decoder runs what is planned.

RANKS = SimulatedRanks()
OPTIONS = {
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
    "qk_norm": "across_heads",
    "intermediate_size": 13,
}


def logits(run: reference_jobs.Run, size: int) -> tuple[torch.Tensor, ...]:
    (result,) = RANKS.run([Job("tests.reference_jobs:logits_job", run, size)])
    if result.failure is not None:
        raise result.failure.exception or RuntimeError(result.failure.message)
    return result.replies


GRID = [
    (heads, kv, SplitPolicy(way, kv_way, widths, quantum))
    for heads, kv in ((9, 9), (12, 4), (12, 3), (7, 1))
    for way, kv_way, widths, quantum in (
        ("even", "unaligned", "pad", 1),
        ("even", "mha", "uneven", 3),
        *itertools.product(("pad", "uneven"), KV_WAYS, ("pad",), (2,)),
    )
]


@pytest.mark.parametrize("tp_size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "policy"), GRID, ids=str)
def test_every_policy_is_the_same_function(
    heads: int, kv_heads: int, policy: SplitPolicy, tp_size: int
) -> None:
    spec = spec_of(heads, kv_heads, **OPTIONS)
    if tp_size not in legal_tp_sizes(spec, tp_size, policy):
        with pytest.raises(IllegalDegreeError):
            build_decoder(spec, single_group(size=tp_size), policy=policy)
        return
    run = reference_jobs.Run(spec, ids_for(spec, 5), poison=True, policy=policy)
    (whole,) = logits(replace(run, policy=STRICT), 1)
    for actual in logits(run, tp_size):
        assert relative_rms(actual, whole) < 1e-12


def test_the_grid_is_mostly_planned_and_sometimes_refused() -> None:
    planned = [
        size in legal_tp_sizes(spec_of(heads, kv, **OPTIONS), size, policy)
        for heads, kv, policy in GRID
        for size in (2, 3, 4, 6, 8)
    ]
    assert len(planned) == 160
    assert 110 < sum(planned) < 160


FULL = [
    (9, 3, 2, PAD),
    (9, 3, 2, replace(PAD, kv="mha")),
    (9, 9, 4, PAD),
    (14, 2, 3, replace(PAD, kv="unaligned")),
    (9, 3, 2, replace(UNEVEN, kv="unaligned")),
    (9, 3, 8, replace(UNEVEN, kv="mha")),
    (12, 4, 6, replace(UNEVEN, kv="unaligned")),
    (5, 5, 8, replace(UNEVEN, vocab_quantum=4)),
    (6, 6, 4, replace(PAD, block=8)),
]


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size", "policy"), FULL, ids=str)
@pytest.mark.parametrize("experts", [0, 4])
def test_placements_and_decoding_hold_for_every_policy(
    heads: int, kv_heads: int, tp_size: int, policy: SplitPolicy, experts: int
) -> None:
    mixture = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "shared_expert_intermediate_size": 9,
    }
    spec = spec_of(heads, kv_heads, **OPTIONS, **(mixture if experts else {}))
    run = reference_jobs.Run(spec, ids_for(spec, 5), policy=policy, poison=True, poison_with=1e30)
    replies = reference_jobs.on_ranks(run, tp_size)
    (whole,) = reference_jobs.on_ranks(replace(run, policy=STRICT), 1)
    assert relative_rms(replies[0].decoded, whole.logits) < 1e-12
    assert list(replies[0].shards) == list(whole.shards) == list(logical_tensors(spec))
    for name, (expected, _) in whole.shards.items():
        locals_, placements = zip(*[reply.shards[name] for reply in replies], strict=True)
        assert tiling_problems(expected.shape, placements, locals_, expected) == [], name
    # a norm's weight has pads that no real input fits: it is not run by itself
    norms = [replies[0].points[f"layers.0.self_attn.{part}_norm"] for part in "qk"]
    assert [norm[2] is None for norm in norms] == [policy.heads == "pad"] * 2
    for fqn, (x, y, _, _) in whole.points.items():
        points = [reply.points[fqn] for reply in replies]
        for expected, local, placement in ((x, 0, 2), (y, 1, 3)):
            placements = [point[placement] for point in points]
            if placements[0] is None or type(placements[0]).__name__ == "Partial":
                continue
            actual = unshard([point[local] for point in points], placements, expected.shape)
            assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-12), fqn


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_thousand_generated_specs_are_the_same_function_however_they_are_split(
    data: st.DataObject,
) -> None:
    tp_size = data.draw(st.sampled_from((2, 3, 4, 6, 8)), label="tp_size")
    spec = data.draw(model_specs(tp_size, max_layers=1, max_hidden=24, max_head_dim=8))
    policy = data.draw(split_policies(spec, tp_size, legal=True))
    run = reference_jobs.Run(spec, ids_for(spec, 3), poison=True, policy=policy)
    (whole,) = logits(replace(run, policy=STRICT), 1)
    for actual in logits(run, tp_size):
        assert relative_rms(actual, whole) < 1e-12
    RANKS.close()


def test_a_policy_that_has_nothing_to_do_changes_no_bit() -> None:
    spec = spec_of(24, 4, vocab_size=24, qk_norm="across_heads")
    run = reference_jobs.Run(spec, ids_for(spec, 5), dtype=torch.bfloat16)
    for tp_size in (2, 4, 8):
        strict = logits(run, tp_size)[0]
        for policy in (PAD, UNEVEN, UNALIGNED, MHA, SplitPolicy("pad", "unaligned", "uneven", 3)):
            assert torch.equal(logits(replace(run, policy=policy), tp_size)[0], strict), policy


POISONS = (float("nan"), float("inf"), 1e30)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("part", ["o_proj", "down_proj"])
def test_pads_that_are_not_left_out_are_seen(part: str, poison: float) -> None:
    """The control: a decoder that multiplies with its pads gives other logits."""
    spec = spec_of(5, intermediate_size=13)
    run = reference_jobs.Run(spec, ids_for(spec, 5), poison=True, poison_with=poison, policy=PAD)
    (whole,) = logits(replace(run, policy=STRICT), 1)
    right = logits(run, 2)[0]
    assert relative_rms(right, whole) < 1e-12
    (result,) = RANKS.run([Job("tests.unit.test_split_policies:leaking_job", (run, part), 2)])
    leaked = result.replies[0]
    assert not relative_rms(leaked, whole) < 1e-12


def leaking_job(world: Any, payload: tuple[reference_jobs.Run, str]) -> torch.Tensor:
    run, part = payload
    tp = world.group(seed=3, dtype=run.dtype, weight_dtype=run.weight_dtype)
    decoder = build_decoder(run.model, tp, policy=run.policy)
    assert (reference_jobs.poison_pads(decoder, run.poison_with) > 0) == (tp.rank == 1)
    layer: Any = decoder.layers[0]
    (layer.self_attn.o_proj if part == "o_proj" else layer.mlp.down_proj).real = None
    return decoder(run.ids)


LATE = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_norm", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("policy", [PAD, UNEVEN, replace(PAD, kv="mha")], ids=str)
@pytest.mark.parametrize("name", LATE)
def test_a_bug_in_an_uneven_or_padded_split_is_found_where_it_is(
    policy: SplitPolicy, name: str
) -> None:
    spec = spec_of(9, 3, **OPTIONS)

    @tpcheck.subject(vocab_size=spec.vocab_size, seq_len=5)
    def build(tp: Any) -> Any:
        decoder = build_decoder(spec, tp, policy=policy if tp.size > 1 else STRICT)
        if tp.rank == 1:
            module = decoder.get_submodule(f"layers.0.{name}")
            module.register_forward_hook(lambda _, __, out: out * 1.01)
        return decoder

    (verdict,) = tpcheck.run(build, tp_sizes=(2,), backend="sim", confirm=False).verdicts
    assert verdict.outcome == "WRONG"
    assert verdict.first_divergence is not None
    assert verdict.first_divergence.fqn == f"layers.0.{name}"


# The strategy.


def test_policies_are_drawn_on_the_side_that_is_asked_for() -> None:
    spec = spec_of(12, 4, intermediate_size=13)
    for legal in (True, False):

        @settings(max_examples=100, database=None)
        @given(split_policies(spec, 6, legal), st.just(legal))
        def on_its_side(policy: SplitPolicy, plans: bool) -> None:
            assert (6 in legal_tp_sizes(spec, 6, policy)) == plans

        on_its_side()


def test_policies_reach_every_way_and_shrink_to_the_strict_one() -> None:
    for heads, kv in itertools.product(WAYS, KV_WAYS):
        found = find(split_policies(), lambda one, h=heads, k=kv: (one.heads, one.kv) == (h, k))
        assert found == SplitPolicy(heads, kv)
    assert find(split_policies(spec_of(8), 4, legal=True), lambda _: True) == STRICT
    assert HEAD_ORDER[0] == (STRICT.heads, STRICT.kv)


def test_a_side_needs_a_spec_and_a_degree() -> None:
    with pytest.raises(TPCheckError, match="spec and tp_size should be given"):
        split_policies(legal=True)
    with pytest.raises(PlanError, match="no policy is refused at tp_size=1"):
        split_policies(spec_of(8), 1, legal=False, blocks=(1,))
