"""One checkpoint at one degree and at another is one function."""

from hypothesis import given
from hypothesis import strategies as st

from properties.layers import decoder
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.strategies import model_specs


@st.composite
def specs_at_two_degrees(draw):
    first, second = draw(tp_degrees()), draw(tp_degrees())
    return draw(model_specs((first, second), legal=True, num_hidden_layers=1)), first, second


@given(specs_at_two_degrees())
def test_two_degrees_of_one_checkpoint_agree(tp_check, point):
    spec, first, second = point
    report = tp_check(decoder(spec, 3), tp_sizes=(first, second))
    assert {verdict.tp_size for verdict in report.verdicts} == {first, second}
    # both equal TP=1 within 1e-12 of its scale, so they equal each other within twice that
    for verdict in report.verdicts:
        facts = verdict.checks["structural"].facts
        assert facts["relative_rms"] <= facts["limit"]
