"""An uneven split is judged beside an even one of the same model, so that a failure tells which."""

from dataclasses import replace

from hypothesis import given

from properties.layers import decoder, specs_at_a_degree


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
