"""Rounding moves logits no further than the reduction explains, in every dtype."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from properties.layers import decoder, specs_at_a_degree
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.strategies import dtypes, fill, input_values


@given(point=specs_at_a_degree(), dtype=dtypes())
def test_a_decoder_drifts_no_further_than_its_reductions_explain(tp_check, point, dtype):
    spec, tp_size = point
    (verdict,) = tp_check(decoder(spec), tp_sizes=(tp_size,), dtypes=(dtype,)).verdicts
    assert verdict.checks["drift"].outcome == "PASS"


@given(
    tp_size=tp_degrees(),
    per_rank=st.integers(1, 40),
    features=st.integers(1, 32),
    values=input_values(),
    dtype=dtypes(),
    seed=st.integers(0, 99),
)
def test_a_bare_row_parallel_layer_drifts_no_further_than_its_reduction_explains(
    tp_check, tp_size, per_rank, features, values, dtype, seed
):
    whole_D = per_rank * tp_size
    if values == "massive" and dtype == "float16":
        dtype = "bfloat16"  # 3e5 is no float16: the input itself would be infinite

    @tpcheck.subject(inputs=lambda generator: fill(values, (2, 8, whole_D), seed=seed), seq_len=8)
    def build(tp):
        w_FD = tp.weight("w", features, whole_D)
        w_Fd = w_FD.chunk(tp.size, 1)[tp.rank]

        def forward(x_TD):
            x_Td = x_TD.chunk(tp.size, -1)[tp.rank]
            return tp.all_reduce(torch.nn.functional.linear(x_Td, w_Fd))

        return forward

    report = tp_check(build, tp_sizes=(tp_size,), dtypes=(dtype,), seed=seed)
    assert report.verdicts[0].checks["structural"].outcome == "PASS"
