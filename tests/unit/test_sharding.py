"""Cutting, joining and the tiling proof, on sound placements and on every way to break one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpcheck.errors import SubjectError
from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices
from tpcheck.sharding import shard, tiling_problems, unshard

FULL = torch.arange(24.0).view(6, 4)


def cut_up(full: torch.Tensor, placements: list[Placement]) -> list[torch.Tensor]:
    size = len(placements)
    return [shard(full, placement, rank, size) for rank, placement in enumerate(placements)]


def rows(*spans: tuple[int, int]) -> list[Placement]:
    """One Slices per rank, each rank's rows from its local row 0 on."""
    return [Slices([(slice(0, stop - start), slice(start, stop))]) for start, stop in spans]


INTERLEAVED = [
    Slices([(slice(0, 1), slice(0, 1)), (slice(1, 3), slice(2, 4))]),
    Slices([(slice(0, 1), slice(1, 2)), (slice(1, 3), slice(4, 6))]),
]
SOUND: dict[str, list[Placement]] = {
    "shard": [Shard(0)] * 3,
    "shard of the last dim": [Shard(-1)] * 2,
    "uneven shard": [Shard(0)] * 4,
    "more ranks than rows": [Shard(0)] * 8,
    "replicate": [Replicate()] * 3,
    "partial": [Partial("sum")] * 3,
    "partial avg": [Partial("avg")] * 3,
    "partial max": [Partial("max")] * 2,
    "interleaved slices": INTERLEAVED,
    "copies of slices": rows((0, 3), (0, 3), (3, 6), (3, 6)),
    "a rank that holds nothing": [*rows((0, 6)), Slices([])],
    "slices beside a replica": [Replicate(), *rows((2, 4))],
    "open slices": [
        Slices([(slice(None), slice(None, 3))]),
        Slices([(slice(None), slice(3, None))]),
    ],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_placements_tile_and_come_back(name: str) -> None:
    placements = SOUND[name]
    locals_ = cut_up(FULL, placements)
    assert torch.equal(unshard(locals_, placements, FULL.shape), FULL)
    assert tiling_problems(FULL.shape, placements) == []
    assert tiling_problems(FULL.shape, placements, locals_) == []
    assert tiling_problems(FULL.shape, placements, locals_, FULL) == []


def test_shard_returns_tensors_of_their_own() -> None:
    full = FULL.clone()
    for placement in (Shard(0), Replicate(), Partial("sum"), INTERLEAVED[0]):
        shard(full, placement, 0, 2).fill_(-1)
    assert torch.equal(full, FULL)


def test_pads_of_any_value_are_left_out() -> None:
    placements = rows((0, 4), (4, 6))
    locals_ = [FULL[:4], torch.cat((FULL[4:], torch.full((2, 4), float("nan"))))]
    assert tiling_problems(FULL.shape, placements, locals_, FULL) == []
    assert torch.equal(unshard(locals_, placements, FULL.shape), FULL)


def test_a_pad_inside_a_slice_is_a_problem() -> None:
    whole_local = [Slices([(slice(0, 4), slice(0, 4))]), Slices([(slice(0, 4), slice(4, 8))])]
    assert tiling_problems(FULL.shape, whole_local) == [
        "rank 1: global slices [4:8] of dim 0, but should lie within 0:6",
        "no rank holds [4:6, 0:4]",
    ]
    short = [*rows((0, 4)), Slices([(slice(0, 4), slice(4, 6))])]
    (problem, _) = tiling_problems(FULL.shape, short)
    assert problem == "rank 1: local [0:4, 0:4], but should have the size of [4:6, 0:4]"


def test_rows_that_nobody_holds_are_named() -> None:
    placements = rows((0, 2), (3, 6))
    assert tiling_problems(FULL.shape, placements) == ["no rank holds [2:3, 0:4]"]
    with pytest.raises(SubjectError, match=r"unshard: no rank holds \[2:3, 0:4\]"):
        unshard([FULL[:2], FULL[3:]], placements, FULL.shape)


def test_shards_that_do_not_add_up_are_named() -> None:
    problems = tiling_problems(FULL.shape, [Shard(0)] * 2, [FULL[:3], FULL[3:5]])
    assert problems == ["no rank holds [5:6, 0:4]"]
    (problem, *_) = tiling_problems(FULL.shape, [Shard(0)] * 2, [FULL[:4], FULL[:4]])
    assert problem.startswith("rank 1: shape=[4, 4], but should be a piece of [6, 4]")
    assert "from index 4 of dim 0" in problem


def test_copies_that_differ_are_named_with_rank_index_and_values() -> None:
    placements = rows((0, 3), (0, 3), (3, 6))
    locals_ = cut_up(FULL, placements)
    locals_[1][2, 1] += 1
    assert tiling_problems(FULL.shape, placements, locals_) == [
        "rank 1: [0:3, 0:4]: 1 of 12 elements differ from the copy on a lower rank;"
        " first at [2, 1]: actual=10, but should be 9"
    ]


def test_a_wrong_value_is_named_by_its_logical_index() -> None:
    placements = [Shard(0)] * 2
    locals_ = cut_up(FULL, placements)
    locals_[1][0, 0] = float("nan")
    (problem,) = tiling_problems(FULL.shape, placements, locals_, FULL)
    assert "rank 1: [3:6, 0:4]: 1 of 12 elements differ from the reference" in problem
    assert "first at [3, 0]: actual=nan, but should be 12" in problem


def test_swapped_shards_are_two_problems() -> None:
    placements = [Shard(0)] * 2
    locals_ = cut_up(FULL, placements)[::-1]
    problems = tiling_problems(FULL.shape, placements, locals_, FULL)
    assert [problem[:7] for problem in problems] == ["rank 0:", "rank 1:"]


def test_equal_nans_are_equal() -> None:
    full = torch.tensor([1.0, float("nan")])
    assert tiling_problems((2,), [Replicate()] * 2, [full, full.clone()], full) == []


def test_a_rank_of_another_dtype_is_a_problem() -> None:
    problems = tiling_problems(FULL.shape, [Replicate()] * 2, [FULL, FULL.double()])
    assert problems == ["rank 1: [0:6, 0:4] is torch.float64, but should be torch.float32"]


def test_partials_that_count_a_term_twice_are_named() -> None:
    placements: list[Placement] = [Partial("sum")] * 3
    terms = [FULL * 0.5, FULL * 0.25, FULL * 0.25]
    assert tiling_problems(FULL.shape, placements, terms, FULL) == []
    (problem,) = tiling_problems(FULL.shape, placements, [FULL * 0.5] * 3, FULL)
    assert problem.startswith("all ranks: the sum of their terms differs from the reference in 23")


@pytest.mark.parametrize(
    ("placements", "phrase"),
    [
        ([], "0 local tensors, but should be 1"),
        ([Shard(2)] * 2, "Shard(dim=2), but should be a dim of shape [6, 4]"),
        ([Shard(0), Replicate()], "rank 1: placement=Replicate()"),
        (
            [Shard(0), Shard(1)],
            "rank 1: placement=Shard(dim=1), but should be rank 0's Shard(dim=0)",
        ),
        ([Slices([(slice(0, 6, 2), slice(0, 3))])], "should be at most 2 slices of step 1"),
        ([Slices([((slice(0, 1),) * 3, slice(0, 1))])], "should be at most 2 slices"),
        ([Slices([(slice(0, 2), slice(-2, 0))])], "but should lie within 0:6"),
        ([Slices([(slice(2, 0), slice(2, 0))])], "but should lie within 0:6"),
    ],
)
def test_malformed_placements_are_sentences(placements: list[Placement], phrase: str) -> None:
    assert phrase in tiling_problems(FULL.shape, placements)[0]


def test_another_shape_than_expected_is_named() -> None:
    assert tiling_problems((6, 4), [Replicate()], [FULL], FULL[:5]) == [
        "shape=[6, 4], but should be [5, 4]"
    ]
    problems = tiling_problems((6, 4), [Replicate()] * 2, [FULL, FULL[:5]])
    assert problems[0] == "rank 1: shape=[5, 4], but should be [6, 4] [Replicate()]"


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1, 1, 1)])
def test_degenerate_shapes_tile(shape: tuple[int, ...]) -> None:
    full = torch.ones(shape)
    placements: list[Placement] = [Replicate()] * 2 if not shape else [Shard(0)] * 2
    locals_ = cut_up(full, placements)
    assert tiling_problems(shape, placements, locals_, full) == []
    assert torch.equal(unshard(locals_, placements, shape), full)


@given(size=st.integers(0, 20), ranks=st.integers(1, 9))
def test_shard_cuts_as_torch_chunk_does(size: int, ranks: int) -> None:
    full = torch.arange(float(size))
    pieces = list(full.chunk(ranks)) if size else []
    pieces += [full[:0]] * (ranks - len(pieces))
    for rank, expected in enumerate(pieces):
        assert torch.equal(shard(full, Shard(0), rank, ranks), expected)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shard("0"), "Shard: dim='0', but should be the number of a dim"),
        (lambda: Shard(True), "Shard: dim=True, but should be the number of a dim"),
        (lambda: Partial("mul"), "Partial: op='mul', but should be one of sum, avg, max, min"),
        (
            lambda: Slices(3),
            r"Slices: pieces=3, but should be \(local region, global region\) pairs",
        ),
        (lambda: Slices([(slice(0, 1), 2)]), "where a region is a slice or a tuple of slices"),
        (lambda: Slices([((0, 1), (2, 3))]), "where a region is a slice or a tuple of slices"),
    ],
)
def test_a_placement_that_says_nothing_is_refused_where_it_is_made(make, said):
    with pytest.raises(SubjectError, match=said):
        make()
