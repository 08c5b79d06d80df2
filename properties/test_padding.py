"""What is padded never reaches a logit, whatever stands in the pads."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from properties.layers import specs_at_a_degree
from tpcheck.reference.decoder import build_decoder
from tpcheck.shard_plan import make_shard_plan

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
