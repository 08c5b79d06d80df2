"""Inputs of a case: the same at every degree, different in every row, swept over lengths."""

import pytest
import torch

from tpcheck.errors import SubjectError
from tpcheck.inputs import (
    MORE,
    input_order,
    make_inputs,
    more_inputs,
    row_lengths,
    sweep_lengths,
    token_ids,
)
from tpcheck.spec import Case
from tpcheck.subjects import Subject, SubjectOptions

torch.set_num_threads(1)
CASE = Case(seed=7, batch=2, seq_len=16)


def subject(**options):
    options = {"vocab_size": 100, "seq_len": 16} | options
    return Subject("models.py:build", lambda tp: None, SubjectOptions(**options))


@pytest.mark.parametrize(
    ("seq_len", "tp_sizes", "lengths"),
    [
        (16, (4,), [1, 3, 4, 5]),
        (16, (2, 4), [1, 2, 3, 4, 5]),
        (4, (4,), [1, 3]),
        (1, (8,), []),
        (16, (1,), [1, 2]),
        (16, (32,), [1]),
    ],
)
def test_lengths_around_every_degree_are_swept_as_far_as_they_fit(seq_len, tp_sizes, lengths):
    assert sweep_lengths(seq_len, tp_sizes) == lengths


def test_token_ids_are_below_the_vocabulary_and_made_for_every_length():
    made = make_inputs(subject(), CASE, (4,))
    assert {name: tuple(ids.shape) for name, (ids,) in made.items()} == {
        "t1": (2, 1),
        "t3": (2, 3),
        "t4": (2, 4),
        "t5": (2, 5),
        "row1": (1, 1),
        "row5": (1, 5),
        "A": (2, 16),
        "B": (2, 16),
    }
    for (ids,) in made.values():
        assert ids.dtype == torch.int64
        assert 0 <= int(ids.min()) <= int(ids.max()) < 100


@pytest.mark.parametrize(
    ("batch", "seq_len", "tp_sizes", "lengths"),
    [
        (2, 16, (2,), [1, 3]),
        (3, 16, (2, 8), [1, 3, 9]),
        (2, 3, (2, 8), [1, 3]),
        (2, 1, (2,), [1]),
        (1, 16, (2,), []),
    ],
)
def test_one_row_is_run_too_where_a_batch_has_more(batch, seq_len, tp_sizes, lengths):
    case = Case(7, batch, seq_len)
    assert row_lengths(case, tp_sizes) == lengths
    made = make_inputs(subject(), case, tp_sizes)
    assert [name for name in made if name.startswith("row")] == [
        f"row{length}" for length in reversed(lengths)
    ]


@pytest.mark.parametrize("tp_size", [2, 3, 4, 6, 8])
def test_all_tokens_together_are_one_and_leave_a_remainder_at_every_degree(tp_size):
    made = make_inputs(subject(), CASE, (tp_size,))
    counts = [made[name][0].numel() for name in input_order(made, tp_size)]
    assert 1 in counts
    assert any(count > tp_size and count % tp_size == 1 for count in counts)


def test_rows_differ_even_at_one_token():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        column = token_ids(generator, 4, 3, 1)[:, 0]
        assert len(set(column.tolist())) == 3


def test_a_vocabulary_smaller_than_the_batch_still_works():
    assert token_ids(torch.Generator(), 1, 3, 2).shape == (3, 2)


def test_a_and_b_differ():
    made = make_inputs(subject(), CASE, (2,))
    assert not torch.equal(made["A"][0], made["B"][0])


def test_a_case_makes_the_same_inputs_for_whatever_degrees_are_run():
    two, eight = (make_inputs(subject(), CASE, sizes) for sizes in ((2,), (2, 8)))
    for name in two:
        assert torch.equal(two[name][0], eight[name][0])


def test_another_seed_makes_other_inputs():
    other = make_inputs(subject(), Case(8, 2, 16), (2,))
    assert not torch.equal(make_inputs(subject(), CASE, (2,))["A"][0], other["A"][0])


def test_sweep_false_pins_the_length():
    assert list(make_inputs(subject(sweep=False), CASE, (4,))) == ["A", "B"]


def test_something_is_run_between_a_and_b_a_where_lengths_are_not():
    made = make_inputs(subject(sweep=False), CASE, (4,))
    assert input_order(made, 4) == input_order(made) == ("A", "B", "B", "A", "A")


def test_a_then_long_before_short_then_b_a_and_only_one_degrees_lengths():
    made = make_inputs(subject(), CASE, (2, 8))
    swept = ("t9", "t8", "t7", "t3", "t2", "t1", "row9", "row3", "row1")
    assert input_order(made) == ("A", *swept, "B", "A", "A")
    assert input_order(made, 8) == ("A", "t9", "t8", "t7", "t1", "row9", "row1", "B", "A", "A")
    assert input_order(made, 2) == ("A", "t3", "t2", "t1", "row3", "row1", "B", "A", "A")


@pytest.mark.parametrize("vocab", [64, 99, 131])
def test_tokens_are_all_different_and_stand_at_the_edges_of_shards(vocab):
    ids = token_ids(torch.Generator().manual_seed(0), vocab, 2, 16)
    assert len(set(ids.flatten().tolist())) == 32
    rows = -(-vocab // 4)
    edges = {0, vocab - 1, rows - 1, rows, 2 * rows - 1, 2 * rows, 3 * rows - 1, 3 * rows}
    assert len(edges & set(ids.flatten().tolist())) >= 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("vocab", "tp_size", "rows"),
    [
        (5003, 2, 2502),  # padded to a multiple of tp
        (5003, 4, 1251),
        (5003, 8, 626),
        (1000, 2, 512),  # to one of 64: 1024
        (50257, 4, 12576),
        (1000, 3, 384),  # to one of 64 * 3, because 1024 does not divide by 3
        (5003, 2, 2560),  # to one of 128 * tp
        (50257, 8, 6400),
    ],
)
def test_a_and_b_hold_both_sides_of_a_shards_edge_however_the_vocabulary_is_padded(
    vocab, tp_size, rows, seed
):
    made = make_inputs(subject(vocab_size=vocab), Case(seed, 2, 16), (2,))
    ids = {int(id_) for name in "AB" for id_ in made[name][0].flatten()}
    edge = tp_size // 2 * rows
    assert {edge - 1, edge} <= ids


@pytest.mark.parametrize("vocab", [8, 63, 64, 131, 50257])
@pytest.mark.parametrize("turn", [0, 1])
def test_telling_ids_are_each_taken_once(vocab, turn):
    ids = token_ids(torch.Generator().manual_seed(0), vocab, 2, 16, turn=turn)
    assert len(set(ids.flatten().tolist())) == min(vocab, 32)


def fixed(generator):
    return torch.randn(3, 5, generator=generator), torch.arange(5)


def shaped(generator, batch, seq_len):
    return torch.randn(batch, seq_len, 4, generator=generator)


def test_a_users_function_of_the_generator_decides_everything():
    made = make_inputs(subject(vocab_size=0, inputs=fixed), CASE, (4,))
    assert list(made) == ["A", "B"]
    assert [tensor.shape for tensor in made["A"]] == [(3, 5), (5,)]
    assert not torch.equal(made["A"][0], made["B"][0])


@pytest.mark.parametrize("function", [shaped, lambda *args: shaped(*args)])
def test_a_users_function_of_batch_and_length_is_swept(function):
    made = make_inputs(subject(vocab_size=0, inputs=function), CASE, (2,))
    assert {name: tuple(x.shape) for name, (x,) in made.items()} == {
        "t1": (2, 1, 4),
        "t2": (2, 2, 4),
        "t3": (2, 3, 4),
        "row1": (1, 1, 4),
        "row3": (1, 3, 4),
        "A": (2, 16, 4),
        "B": (2, 16, 4),
    }


def test_inputs_are_plain_tensors_without_history():
    def learned(generator):
        return torch.randn(2, generator=generator).requires_grad_() * 2

    (x,) = make_inputs(subject(inputs=learned), CASE, (2,))["A"]
    assert not x.requires_grad


def boom(generator):
    raise KeyError("no data")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (boom, "models.py:build: inputs() raised KeyError: 'no data'"),
        (
            lambda generator: [1, 2],
            "models.py:build: inputs() returned int,"
            " but should return a tensor or a tuple of tensors",
        ),
        (
            lambda generator: None,
            "models.py:build: inputs() returned NoneType,"
            " but should return a tensor or a tuple of tensors",
        ),
    ],
)
def test_inputs_that_cannot_be_made_are_the_subjects_error(function, message):
    with pytest.raises(SubjectError) as error:
        make_inputs(subject(inputs=function), CASE, (2,))
    assert str(error.value) == message


def test_further_inputs_are_like_a_and_differ_from_it_and_from_each_other():
    own = make_inputs(subject(), CASE, (2,))
    further = more_inputs(subject(), CASE)
    assert len(further) == MORE
    ids = [*(own[key][0] for key in "AB"), *(one for (one,) in further.values())]
    assert {tuple(one.shape) for one in ids} == {(CASE.batch, CASE.seq_len)}
    assert len({tuple(one.flatten().tolist()) for one in ids}) == MORE + 2
