"""Bugs that decide otherwise: what no noise floor and no tie between masked candidates may hide."""

import math

import pytest
import torch
import torch.nn.functional as F

import tpcheck

torch.set_num_threads(1)
VOCAB, HIDDEN, HEADS, LENGTH = 64, 32, 4, 12
subject = tpcheck.subject(vocab_size=VOCAB, seq_len=LENGTH)


def attention(tp, bias_of):
    """One causal layer between embedding and head; `bias_of(x, heads of this rank)` is added."""
    if HEADS % tp.size:
        raise tpcheck.IllegalDegreeError(f"num_attention_heads={HEADS}, tp_size={tp.size}")
    embed = tp.weight("embed_tokens.weight", VOCAB, HIDDEN, std=1.0)
    q, k, v = (
        tp.weight(f"{name}_proj.weight", HIDDEN, HIDDEN).chunk(tp.size)[tp.rank] for name in "qkv"
    )
    o = tp.weight("o_proj.weight", HIDDEN, HIDDEN).chunk(tp.size, 1)[tp.rank]
    heads = HEADS // tp.size

    def forward(ids):
        x = embed[ids]
        query, key, value = (
            (x @ w.T).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v)
        )
        mask = torch.full((ids.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
        scores = query @ key.transpose(-1, -2) / 8**0.5 + mask + bias_of(x)
        y = F.softmax(scores.float(), -1).to(x.dtype) @ value
        return (x + tp.all_reduce(y.transpose(1, 2).flatten(2) @ o.T)) @ embed.T

    return forward


def distance_buckets(length):
    """T5's, whose logarithm stands on the edge of a bucket at a distance of 8."""
    distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
    far = 4 + (torch.log(distance.float().clamp(min=1) / 4) / math.log(4) * 4).long()
    return torch.where(distance < 4, distance, far.clamp(max=7))


def relative_bias(tp, scale):
    table = tp.weight("relative_attention_bias.weight", 8, HEADS, std=2.0)
    table = table.chunk(tp.size, 1)[tp.rank] * scale
    return attention(tp, lambda x: table[distance_buckets(x.shape[1])].permute(2, 0, 1).to(x.dtype))


@subject
def relative_bias_right(tp):
    return relative_bias(tp, 1.0)


@subject
def relative_bias_off_on_one_rank(tp):
    return relative_bias(tp, 1.01 if tp.rank == 1 else 1.0)


def sparse(tp, reduce):
    """Every token attends to the four that an indexer, whose heads are sharded, scores highest."""
    queries = tp.weight("indexer.q.weight", HIDDEN, HIDDEN).chunk(tp.size)[tp.rank]
    keys = tp.weight("indexer.k.weight", 8, HIDDEN)

    def bias(x):
        query = (x @ queries.T).unflatten(-1, (HEADS // tp.size, -1))
        scores = reduce(F.relu(torch.einsum("bthd,bsd->bhts", query, x @ keys.T)).sum(1))
        scores = scores + torch.full_like(scores[0], -math.inf).triu(1)
        chosen = scores.topk(min(4, x.shape[1]), -1).indices
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)[:, None]

    return attention(tp, bias)


@subject
def sparse_right(tp):
    return sparse(tp, tp.all_reduce)


@subject
def sparse_by_a_ranks_own_scores(tp):
    return sparse(tp, lambda scores: scores)


@pytest.mark.parametrize(
    ("build", "outcome"),
    [
        (relative_bias_right, "PASS"),
        (relative_bias_off_on_one_rank, "WRONG"),
        (sparse_right, "PASS"),
        (sparse_by_a_ranks_own_scores, "WRONG"),
    ],
)
def test_what_is_decided_otherwise_is_wrong_and_nothing_else(build, outcome):
    report = tpcheck.run(build, tp_sizes=(2, 4), backend="sim", confirm=False)
    assert [verdict.outcome for verdict in report.verdicts] == [outcome] * 2
