"""Sharding then unsharding is the identity, and shards tile every tensor exactly once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from properties.layers import specs_at_a_degree
from tpcheck import Replicate, Shard
from tpcheck.pytest_plugin import tp_degrees
from tpcheck.reference.layout import cut, logical_tensors
from tpcheck.shard_plan import make_shard_plan
from tpcheck.sharding import shard, tiling_problems, unshard

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@given(tp_degrees(), SHAPES, st.data())
def test_sharding_then_unsharding_is_the_identity(tp_size, shape, data):
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="dim")
    for placement in (Shard(dim), Replicate()):
        pieces = [shard(full, placement, rank, tp_size) for rank in range(tp_size)]
        assert torch.equal(unshard(pieces, [placement] * tp_size, shape), full)


@given(specs_at_a_degree())
def test_the_shards_of_every_weight_tile_it_exactly_once(point):
    spec, tp_size = point
    plan = make_shard_plan(spec, tp_size)
    for name, tensor in logical_tensors(spec).items():
        held = torch.zeros(tensor.shape, dtype=torch.int64)
        cuts = [cut(spec, plan, rank, tensor) for rank in range(tp_size)]
        problems = tiling_problems(tensor.shape, [one.placement for one in cuts])
        assert not problems, (name, problems)
        for one in cuts:
            held.narrow(one.dim, one.span.start, one.span.size).add_(1)
        copies = plan.kv_replicas if tensor.split == "kv" else 1
        expected = tp_size if not tensor.split else copies
        assert (held == expected).all(), f"{name}: held {held.unique().tolist()} times"


@given(tp_degrees(), SHAPES, st.data())
def test_a_missing_a_foreign_and_a_changed_piece_are_each_seen(tp_size, shape, data):
    shape = [max(tp_size, shape[0]), *shape[1:]]
    full = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).reshape(shape)
    placements = [Shard(0)] * tp_size
    pieces = [shard(full, Shard(0), rank, tp_size) for rank in range(tp_size)]
    assert not tiling_problems(shape, placements, pieces, full)
    victim = data.draw(st.integers(0, tp_size - 1), label="victim")
    if pieces[victim].numel():
        changed = [piece.clone() for piece in pieces]
        changed[victim].view(-1)[-1] += 1
        assert tiling_problems(shape, placements, changed, full)
        short = [*pieces[:victim], pieces[victim][:-1], *pieces[victim + 1 :]]
        assert tiling_problems(shape, placements, short, full)
