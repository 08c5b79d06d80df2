"""What is padded never reaches a logit, whatever stands in the pads."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tpcheck
from properties.layers import specs_at_a_degree, split_decoder
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import SplitPolicy, legal_tp_sizes, make_shard_plan, tensor_cuts
from tpcheck.spec import ModelSpec
from tpcheck.strategies import model_specs

POISONS = st.sampled_from((float("nan"), 1e30, -1e30, float("inf")))


def with_poisoned_pads(spec, poison):
    """The decoder whose vocabulary pads hold a poison, in the embedding and in the head."""

    @tpcheck.subject(spec=spec, seq_len=min(3, spec.max_position_embeddings))
    def build(tp):
        decoder = build_decoder(spec, tp)
        real = make_shard_plan(spec, tp.size).ranks[tp.rank].vocab.size
        for module in (decoder.embed_tokens, decoder.lm_head):
            module.weight_vD.data[real:] = poison
        bias = decoder.lm_head.bias_v
        if bias is not None:
            bias.data[real:] = poison
        return decoder

    return build


@given(point=specs_at_a_degree(num_hidden_layers=1), poison=POISONS, data=st.data())
def test_vocabulary_pads_never_reach_a_logit(tp_check, point, poison, data):
    spec, tp_size = point
    report = tp_check(with_poisoned_pads(spec, poison), tp_sizes=(tp_size,))
    assert report.verdicts[0].checks["structural"].outcome == "PASS"


@st.composite
def padded_splits(draw, **pins):
    """A spec, a degree that need not divide it, and a policy that pads what has to be."""
    tp_size = draw(tp_degrees())
    spec = draw(model_specs(tp_size, num_hidden_layers=1, **pins))
    kv = draw(st.sampled_from(("shard_or_replicate", "unaligned", "mha")))
    quantum, block = draw(st.sampled_from((1, 4, 16))), draw(st.sampled_from((1, 2, 8)))
    policy = SplitPolicy("pad", kv, "pad", quantum, block)
    unaligned = SplitPolicy("pad", "unaligned", "pad", quantum)
    for other in (policy, unaligned, replace(unaligned, scales="replicate")):
        if tp_size in legal_tp_sizes(spec, tp_size, other):
            return spec, tp_size, other
    raise AssertionError("with unaligned KV heads, no blocks and copied scales every degree plans")


@given(split=padded_splits(), poison=POISONS)
def test_padded_heads_features_and_rows_never_reach_a_logit(tp_check, split, poison):
    spec, tp_size, policy = split
    report = tp_check(split_decoder(spec, policy, poison=poison), tp_sizes=(tp_size,))
    assert report.verdicts[0].checks["structural"].outcome == "PASS"
    assert report.verdicts[0].checks["tiling"].outcome == "PASS"


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 7}


@settings(max_examples=30)
@given(split=padded_splits(mlp="gated", **EXPERTS), poison=POISONS)
def test_padded_features_of_experts_never_reach_a_logit(tp_check, split, poison):
    spec, tp_size, policy = split
    tp_check(split_decoder(spec, policy, poison=poison), tp_sizes=(tp_size,))


def test_pads_are_there_to_be_poisoned():
    """The control: of 5 heads, 7 features and 9 rows every kind of weight has pads at TP=4."""
    spec = ModelSpec(9, 16, 7, 1, 5, head_dim=4, attention_bias=True)
    cuts = tensor_cuts(spec, make_shard_plan(spec, 4, SplitPolicy("pad", "mha", "pad")))
    padded = {name for name, ranks in cuts.items() if any(one.pads for one in ranks)}
    assert padded == {name for name in cuts if "norm" not in name}


@given(point=specs_at_a_degree(num_hidden_layers=1, sliding_window=0), pads=st.integers(1, 4))
def test_tokens_padded_on_the_right_never_reach_the_logits_before_them(tp_check, point, pads):
    spec, tp_size = point
    length = 3

    @tpcheck.subject(spec=spec, seq_len=min(length, spec.max_position_embeddings))
    def build(tp):
        decoder = build_decoder(spec, tp)

        def forward(ids):
            room = spec.max_position_embeddings - ids.shape[1]
            # the pads differ between TP=1 and TP=N: if one was read, the logits would too
            fill = (tp.size * 7 + 1) % spec.vocab_size
            padded = torch.nn.functional.pad(ids, (0, min(pads, room)), value=fill)
            return decoder(padded)[:, : ids.shape[1]]

        return forward

    tp_check(build, tp_sizes=(tp_size,))
