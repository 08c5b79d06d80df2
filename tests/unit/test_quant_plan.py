"""Refusals of quantized splits name block, size and degree, and every way out they name is one."""

from __future__ import annotations

import itertools
import json
import re
import time
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import tpcheck
from tpcheck.cli import app
from tpcheck.errors import IllegalDegreeError
from tpcheck.quantization import Quantization
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import STRICT, SplitPolicy, best_plan, legal_tp_sizes, make_shard_plan
from tpcheck.shard_plan.rules import head_problems, width_problems
from tpcheck.spec import ModelSpec
from tpcheck.strategies import quantizations

BLOCKS = Quantization("fp8", 128, 128)
CLASSIC = ModelSpec(64, 256, 512, 1, 64, head_dim=128, quantization=BLOCKS)
"""64 features of the MLP per rank at TP=8, in blocks of 128."""


def refusal(spec: ModelSpec, tp_size: int, policy: SplitPolicy = STRICT) -> str:
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(spec, tp_size, policy)
    return str(error.value)


def test_the_classic_is_refused_with_block_size_degree_and_every_way_out() -> None:
    assert refusal(CLASSIC, 8) == (
        "layers.*.mlp: intermediate_size=512: rank 0 gets 64 of 512 features, but should get whole"
        " blocks of 128 (quantization: fp8, block [128, 128]) [llama, tp_size=8]\n"
        "  512 features padded to 1024 would split into 128 per rank: intermediate_size=1024\n"
        "  so would blocks of 64: 64 per rank, 64 divides 128\n"
        '  so would copies of the scales that two ranks need: SplitPolicy(scales="replicate")\n'
        "  tp_size that fit this spec, up to 16: 1, 2, 4"
    )
    assert legal_tp_sizes(CLASSIC, 16) == (1, 2, 4)
    make_shard_plan(replace(CLASSIC, intermediate_size=1024), 8)
    make_shard_plan(replace(CLASSIC, quantization=Quantization("fp8", 64, 64)), 8)
    make_shard_plan(CLASSIC, 8, SplitPolicy(scales="replicate"))


def test_copied_kv_heads_say_what_a_rank_has_and_not_a_share_of_all() -> None:
    spec = replace(CLASSIC, num_attention_heads=16, num_key_value_heads=2, head_dim=64)
    text = refusal(spec, 4)
    assert "num_key_value_heads=2: rank 0 gets 64 of 128 features" in text
    assert "so would blocks of 64: 64 per rank, 64 divides 128" in text
    make_shard_plan(replace(spec, quantization=Quantization("fp8", 64, 64)), 4)


def test_a_part_of_a_fused_tensor_that_begins_within_a_block_is_named() -> None:
    fused = replace(BLOCKS, fused=True)
    spec = ModelSpec(64, 256, 192, 1, 2, head_dim=128, quantization=fused)
    text = refusal(spec, 2)
    assert "layers.*.mlp.up_proj: begins at feature 192 of the fused tensor" in text
    assert "but should begin at a block of 128" in text
    assert 'it may with copies of the scales that two ranks need: SplitPolicy(scales="re' in text
    make_shard_plan(spec, 2, SplitPolicy(scales="replicate"))


def test_a_cut_word_of_codes_has_no_finer_block() -> None:
    spec = ModelSpec(64, 64, 48, 1, 4, head_dim=16, quantization=Quantization("awq", 8))
    text = refusal(spec, 4)  # 12 features per rank, words of 8
    assert "blocks of 8 (quantization: awq, group_size=8)" in text
    assert "so would blocks of" not in text
    assert "48 features padded to 64 would split into 16 per rank: intermediate_size=64" in text


HEADS, WIDTHS = st.integers(1, 3), st.integers(1, 9)


@settings(max_examples=150)
@given(
    data=st.data(),
    tp_size=st.sampled_from((2, 3, 4, 8)),
    per_rank=st.tuples(HEADS, WIDTHS),
    head_dim=st.sampled_from((2, 6, 8, 16)),
)
def test_every_way_out_of_a_refusal_plans(
    data: st.DataObject, tp_size: int, per_rank: tuple[int, int], head_dim: int
) -> None:
    heads, width = (tp_size * count for count in per_rank)
    spec = ModelSpec(64, 64, width * 4, 1, heads, head_dim=head_dim, position="learned")
    stored = replace(data.draw(quantizations(spec, tp_size, legal=False)), fused=False)
    spec = replace(spec, quantization=stored)
    broken = [*head_problems(spec, tp_size, STRICT), *width_problems(spec, tp_size, STRICT)]
    if not broken:
        return  # it was refused as fused alone
    assert stored.describe() in broken[0].line
    text = refusal(spec, tp_size)
    padded = dict(re.findall(r"per rank: (\w+)=(\d+)", text))
    wider = {name: int(value) for name, value in padded.items()}
    if "num_attention_heads" in wider:  # each has a KV head of its own
        wider["num_key_value_heads"] = wider["num_attention_heads"]
    make_shard_plan(replace(spec, **wider), tp_size)  # type: ignore[arg-type]
    finer = [int(size) for size in re.findall(r"so would blocks of (\d+):", text)]
    if len(finer) == len(broken):
        size = gcd(*finer)
        rows, group = gcd(stored.block_rows, size), gcd(stored.group_size, size)
        rows = stored.block_rows if stored.block_rows < 2 else rows
        changed = replace(stored, group_size=group, block_rows=rows)
        make_shard_plan(replace(spec, quantization=changed), tp_size)
    assert text.count('SplitPolicy(scales="replicate")') == len(broken)
    make_shard_plan(spec, tp_size, SplitPolicy(scales="replicate"))
    (fitting,) = re.findall(r"up to (\d+): (.*)", text)
    legal = legal_tp_sizes(spec, int(fitting[0]))
    assert fitting[1] == ", ".join(map(str, legal))
    for size in legal:
        make_shard_plan(spec, size)


def test_the_unit_of_a_width_is_whole_exactly_where_the_plan_says_so() -> None:
    """Every width up to 48 by brute force: a rank's features are whole blocks, rows and columns."""
    for rows, group, tp_size in itertools.product((1, 2, 3, 4), (0, 2, 3, 8), (2, 3, 4)):
        stored = Quantization("fp8", group, rows, skip=("self_attn",))
        for width in range(1, 49):
            spec = ModelSpec(16, 8, width, 1, tp_size, head_dim=2, quantization=stored)
            edges = [width * rank // tp_size for rank in range(tp_size + 1)]
            even = width % tp_size == 0
            whole = all(edge % rows == 0 and edge % (group or 1) == 0 for edge in edges[1:-1])
            assert (tp_size in legal_tp_sizes(spec, tp_size)) == (even and whole), (stored, width)


def test_the_best_plan_keeps_blocks_whole_where_it_can_and_else_copies_scales() -> None:
    assert best_plan(CLASSIC, 8).policy == SplitPolicy(intermediate="pad")
    fused = replace(CLASSIC, intermediate_size=192, quantization=replace(BLOCKS, fused=True))
    assert best_plan(fused, 2).policy == SplitPolicy(scales="replicate")


# Before any rank starts.


@tpcheck.subject(spec=CLASSIC)
def classic(tp: tpcheck.TPGroup) -> Any:
    return build_decoder(CLASSIC, tp)


def test_a_run_of_the_classic_ends_in_the_plans_refusal() -> None:
    report = tpcheck.run(classic, (8,), backend="sim", confirm=False)
    assert report.outcome == "ILLEGAL"
    (verdict,) = report.verdicts
    reasons = " ".join(verdict.reasons)
    assert "rank 0 gets 64 of 512 features, but should get whole blocks of 128" in reasons


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 64,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    },
}


def test_the_command_plans_the_blocks_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    refused = planned(path)
    assert refused.exit_code == 1
    assert "tp 8: refused by reference" in refused.output
    assert "rank 0 gets 64 of 512 features" in " ".join(refused.output.split())
    assert "pad intermediate_size to 1024; or use tp_size=4" in refused.output
    path.write_text(json.dumps({**CONFIG, "intermediate_size": 1024}))
    assert planned(path).exit_code == 0


def planned(path: Path) -> Result:
    return CliRunner().invoke(app, ["plan", str(path), "--engine", "reference", "--tp", "4,8"])


# Speed.

DEEPSEEK = ModelSpec(
    129280,
    7168,
    18432,
    61,
    128,
    head_dim=128,
    num_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    shared_expert_intermediate_size=2048,
    quantization=BLOCKS,
)


@pytest.mark.parametrize("fused", [False, True])
def test_a_plan_of_a_large_quantized_model_takes_less_than_a_millisecond(fused: bool) -> None:
    times = []
    for layers in range(30):  # another spec each time: nothing is cached
        stored = replace(BLOCKS, fused=fused)
        spec = replace(DEEPSEEK, num_hidden_layers=61 + layers, quantization=stored)
        start = time.process_time()
        make_shard_plan(spec, 8)
        times.append(time.process_time() - start)
    assert sorted(times)[15] < 1e-3
