"""The plan: who holds which heads, features and vocabulary rows, and which degrees are refused."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.errors import IllegalDegreeError
from tpcheck.shard_plan import Span, legal_tp_sizes, make_shard_plan
from tpcheck.spec import ModelSpec


def spec_of(**fields: object) -> ModelSpec:
    return ModelSpec.from_fields(
        {
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            **fields,
        }
    )


STORIES = spec_of(hidden_size=288, num_attention_heads=6, intermediate_size=768)


def test_heads_that_do_not_divide_are_refused_in_full() -> None:
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(STORIES, 4)
    assert str(error.value) == (
        "layers.*.self_attn: num_attention_heads=6,"
        " but should be divisible by tp_size=4 [llama, tp_size=4]\n"
        "  hidden_size=288 divides by 4, so slicing alone would succeed and silently"
        " give head_dim=72 instead of 48\n"
        "  tp_size that fit this spec, up to 12: 1, 2, 3, 6"
    )
    assert error.value.legal_tp_sizes == (1, 2, 3, 6)
    again = pickle.loads(pickle.dumps(error.value))
    assert again.legal_tp_sizes == error.value.legal_tp_sizes


def test_kv_heads_that_fit_neither_way_are_refused() -> None:
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(spec_of(num_attention_heads=12, num_key_value_heads=4, head_dim=8), 6)
    assert str(error.value).splitlines()[0] == (
        "layers.*.self_attn: num_key_value_heads=4,"
        " but should divide tp_size=6 or be divisible by it [llama, tp_size=6]"
    )


def test_every_broken_rule_is_named() -> None:
    with pytest.raises(IllegalDegreeError) as error:
        make_shard_plan(spec_of(intermediate_size=97), 3)
    message = str(error.value)
    assert "num_attention_heads=8, but should be divisible by tp_size=3" in message
    assert "layers.*.mlp: intermediate_size=97, but should be divisible by tp_size=3" in message
    assert message.splitlines()[-1].endswith("up to 12: 1")


@pytest.mark.parametrize("tp_size", [0, -1, True, 2.0, "2"])
def test_a_degree_that_is_no_count_is_refused(tp_size: object) -> None:
    with pytest.raises(IllegalDegreeError, match="but should be a whole number of at least 1"):
        make_shard_plan(STORIES, tp_size)  # type: ignore[arg-type]


def test_kv_heads_are_replicated_above_their_number() -> None:
    plan = make_shard_plan(spec_of(num_key_value_heads=2), 8)
    assert plan.kv_replicas == 4
    assert [rank.kv_heads for rank in plan.ranks] == [Span(0, 1)] * 4 + [Span(1, 2)] * 4


def test_a_vocabulary_smaller_than_its_padding_leaves_ranks_empty() -> None:
    plan = make_shard_plan(spec_of(vocab_size=5), 4)
    assert plan.vocab_rows == 2
    assert plan.padded_vocab_size == 8
    assert [rank.vocab for rank in plan.ranks] == [Span(0, 2), Span(2, 4), Span(4, 5), Span(5, 5)]


def test_legal_tp_sizes_are_those_that_plan() -> None:
    for size in range(1, 65):
        if size in legal_tp_sizes(STORIES):
            assert len(make_shard_plan(STORIES, size).ranks) == size
        else:
            with pytest.raises(IllegalDegreeError):
                make_shard_plan(STORIES, size)


@given(
    kv_heads=st.integers(1, 8),
    group=st.integers(1, 6),
    width=st.integers(1, 64),
    vocab_size=st.integers(1, 300),
    tp_size=st.integers(1, 24),
)
def test_a_plan_covers_everything_and_query_heads_meet_their_kv_heads(
    kv_heads: int, group: int, width: int, vocab_size: int, tp_size: int
) -> None:
    spec = spec_of(
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=4,
        intermediate_size=width,
        vocab_size=vocab_size,
    )
    if tp_size not in legal_tp_sizes(spec, tp_size):
        return
    plan = make_shard_plan(spec, tp_size)
    for total, spans in (
        (kv_heads * group, [rank.query_heads for rank in plan.ranks]),
        (width, [rank.intermediate for rank in plan.ranks]),
        (vocab_size, [rank.vocab for rank in plan.ranks]),
    ):
        assert spans[0].start == 0
        assert spans[-1].stop == total
        assert all(left.stop == right.start for left, right in itertools.pairwise(spans))
    assert all(rank.vocab.size <= plan.vocab_rows for rank in plan.ranks)
    for rank in plan.ranks:
        wanted = {head // group for head in range(*rank.query_heads)}
        assert wanted == set(range(*rank.kv_heads))
    held = [head for rank in plan.ranks for head in range(*rank.kv_heads)]
    assert held == [head for head in range(kv_heads) for _ in range(plan.kv_replicas)]


def test_planning_and_reading_configs_loads_no_torch() -> None:
    code = (
        "import sys, tpcheck.shard_plan, tpcheck.hf.config, tpcheck.pieces;"
        "import tpcheck.reference.layout; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
