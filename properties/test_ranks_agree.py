"""What every rank holds or computes alike has the same bits on every rank."""

import torch
from hypothesis import given

import tpcheck
from properties.layers import decoder, specs_at_a_degree
from tpcheck.reference.decoder import build_decoder
from tpcheck.strategies import dtypes


@given(point=specs_at_a_degree(), dtype=dtypes())
def test_every_rank_returns_the_same_bits(tp_check, point, dtype):
    spec, tp_size = point
    (verdict,) = tp_check(decoder(spec), tp_sizes=(tp_size,), dtypes=(dtype,)).verdicts
    assert verdict.checks["rank_agreement"].outcome == "PASS"
    assert verdict.checks["repeatability"].outcome == "PASS"


@given(point=specs_at_a_degree(num_hidden_layers=1), dtype=dtypes())
def test_replicated_activations_have_the_same_bits_on_every_rank(tp_check, point, dtype):
    spec, tp_size = point

    @tpcheck.subject(spec=spec, seq_len=min(3, spec.max_position_embeddings))
    def build(tp):
        model = build_decoder(spec, tp)
        wanted = [
            module
            for module, _, out in model.trace_points.values()
            if isinstance(out, tpcheck.Replicate)
        ]

        def forward(ids):
            seen = []
            handles = [
                module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
                for module in wanted
            ]
            model(ids)
            for handle in handles:
                handle.remove()
            return torch.cat([one.flatten(2) for one in seen], -1)

        return forward

    (verdict,) = tp_check(build, tp_sizes=(tp_size,), dtypes=(dtype,)).verdicts
    assert verdict.checks["rank_agreement"].outcome == "PASS"
