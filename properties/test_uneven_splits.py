"""An uneven split is judged beside an even one of the same model, so that a failure tells which."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from properties.layers import decoder, specs_at_a_degree, split_decoder
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.shard_plan import SplitPolicy, legal_tp_sizes
from tpcheck.strategies import model_specs


@given(point=specs_at_a_degree(num_hidden_layers=1))
def test_a_vocabulary_that_divides_by_nothing_is_as_right_as_the_even_one_beside_it(
    tp_check, point
):
    spec, tp_size = point
    rows = -(-spec.vocab_size // tp_size)
    even = replace(spec, vocab_size=rows * tp_size)
    uneven = replace(spec, vocab_size=rows * tp_size - (1 if rows > 1 or tp_size > 2 else 0))
    for one in (even, uneven):
        tp_check(decoder(one, 3), tp_sizes=(tp_size,))


@given(point=specs_at_a_degree(num_hidden_layers=1, tie_word_embeddings=True))
def test_a_tied_head_is_as_right_as_an_untied_one(tp_check, point):
    spec, tp_size = point
    for one in (spec, replace(spec, tie_word_embeddings=False)):
        tp_check(decoder(one, 3), tp_sizes=(tp_size,))


@st.composite
def uneven_splits(draw, **pins):
    """A spec, a degree that need not divide it, and a policy that gives ranks unequal parts."""
    tp_size = draw(tp_degrees())
    spec = draw(model_specs(tp_size, num_hidden_layers=1, **pins))
    kv = draw(st.sampled_from(("shard_or_replicate", "unaligned", "mha")))
    policy = SplitPolicy("uneven", kv, "uneven", draw(st.sampled_from((1, 3))))
    for change in ({}, {"kv": "unaligned"}, {"scales": "replicate"}):
        policy = replace(policy, **change)
        if tp_size in legal_tp_sizes(spec, tp_size, policy):
            break
    return spec, tp_size, policy


def even_beside(spec, tp_size):
    """The same model with as many KV groups and features more as it takes to split it evenly."""
    group = spec.num_attention_heads // spec.num_key_value_heads
    kv_heads = -(-spec.num_key_value_heads // tp_size) * tp_size
    return replace(
        spec,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        intermediate_size=-(-spec.intermediate_size // tp_size) * tp_size,
    )


@settings(max_examples=50)
@given(split=uneven_splits())
def test_uneven_heads_and_features_are_as_right_as_the_even_ones_beside_them(tp_check, split):
    spec, tp_size, policy = split
    even = even_beside(spec, tp_size)
    copied = SplitPolicy(scales="replicate")  # of quantized models, heads and widths come out even
    assert tp_size in legal_tp_sizes(even, tp_size, copied)
    tp_check(split_decoder(even, copied), tp_sizes=(tp_size,))
    report = tp_check(split_decoder(spec, policy), tp_sizes=(tp_size,))
    assert report.verdicts[0].checks["tiling"].outcome == "PASS"


@settings(max_examples=30)
@given(split=uneven_splits(qk_norm="across_heads"))
def test_a_norm_across_uneven_heads_counts_every_real_head_once(tp_check, split):
    spec, tp_size, policy = split
    tp_check(split_decoder(spec, policy), tp_sizes=(tp_size,))
