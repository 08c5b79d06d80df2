"""For every legal spec and degree the sharded decoder is the same function as the whole one."""

from hypothesis import given
from hypothesis import strategies as st

import tpcheck
from properties.layers import decoder, specs_at_a_degree
from tpcheck.strategies import token_counts


@given(point=specs_at_a_degree(), seed=st.integers(0, 99), data=st.data())
def test_a_legal_spec_is_the_same_function_at_every_degree(tp_check, point, seed, data):
    spec, tp_size = point
    seq_len = data.draw(token_counts(tp_size, 9), label="seq_len")
    report = tp_check(decoder(spec, seq_len), tp_sizes=(tp_size,), seed=seed)
    (verdict,) = report.verdicts
    assert verdict.checks["structural"].outcome == "PASS", "float64 was compared, not skipped"
    assert verdict.checks["tiling"].outcome == "PASS"


@given(point=specs_at_a_degree(num_hidden_layers=1), batch=st.integers(1, 4))
def test_the_batch_changes_nothing(tp_check, point, batch):
    spec, tp_size = point
    tp_check(decoder(spec, 3), tp_sizes=(tp_size,), batch=batch)


def test_a_fault_would_be_seen(tp_pool):
    """The control: the same property, of a decoder that has a bug."""
    tp_size = tp_pool.degrees[0]
    report = tp_pool.run(
        "builtin:llama-tiny+missing_all_reduce", tp_sizes=(tp_size,), backend="sim", confirm=False
    )
    assert report.outcome == "WRONG", tpcheck.__name__
