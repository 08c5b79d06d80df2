"""The inputs of a case: made once, the same at every degree, chosen not to hide bugs.

Requirement: batch rows differ (a hook that returns output[0] is invisible when rows are equal),
lengths 1, tp-1, tp, tp+1 and the longest are all tried, and the longest runs as A, B, A, A on one
built subject so that state leaking from call to call shows. Long comes before short, because what
a longer call left in a buffer shows in the shorter one after it; so the others are between A and B.
Token ids are as different as they can be, and every second one stands at the edge of a vocabulary
shard, where masks go wrong.

[One Row] Engines lay the rows of a batch one behind the other and deal out all tokens together. Two
rows are never one token, and never leave a remainder at TP=2: so one row is run too, with one token
and with tp+1. A subject may be made for more rows: then it runs without (`fewer_inputs`).

[Shard Edges] Where a rank's vocabulary ends depends on how it is padded. A and B together hold the
last row of one shard and the first of the next for every way that engines have.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.spec import Case
from tpcheck.subjects import Subject

Inputs = Mapping[str, tuple[torch.Tensor, ...]]

Make = Callable[[torch.Generator, int, int | None], tuple[torch.Tensor, ...]]
"""(generator, length, whose turn it is to take the most telling ids: A's, B's, nobody's)."""

MORE = 8
"""Further inputs: with A and B they make a ratio of errors three times as sure."""

_EDGE_DEGREES = (2, 3, 4, 8)
"""Fixed, so that a case has the same inputs whatever degrees are asked for."""

_ROW_STREAM = 1 << 20
"""Far from the lengths of the sweep, whose streams are their lengths."""


def sweep_lengths(seq_len: int, tp_sizes: Sequence[int]) -> list[int]:
    """Return 1, tp-1, tp, tp+1 for every degree, as far as they are shorter than `seq_len`."""
    wanted = {1} | {tp + step for tp in tp_sizes for step in (-1, 0, 1)}
    return sorted(length for length in wanted if 1 <= length < seq_len)


def row_lengths(case: Case, tp_sizes: Sequence[int]) -> list[int]:
    """Return the lengths that are run with one row, too (inputs: [One Row])."""
    wanted = {1, *(tp + 1 for tp in tp_sizes)} if case.batch > 1 else set()
    return sorted(length for length in wanted if length <= case.seq_len)


def make_inputs(subject: Subject, case: Case, tp_sizes: Sequence[int]) -> Inputs:
    """Return input id -> arguments of forward.

    The sweep's are `t<length>`, then `row<length>` of one row, then A and B.

    Raises:
        SubjectError: the subject's own `inputs` raises or returns something else than tensors.
    """
    make, takes_length = _maker(subject, case)
    made: dict[str, tuple[torch.Tensor, ...]] = {}
    if subject.options.sweep and takes_length:
        one_row, _ = _maker(subject, replace(case, batch=1))
        for n in reversed(sweep_lengths(case.seq_len, tp_sizes)):
            made[f"t{n}"] = make(_generator(case.seed, n), n, None)
        with contextlib.suppress(SubjectError):  # a subject's own inputs may want two rows
            for n in reversed(row_lengths(case, tp_sizes)):
                made[f"row{n}"] = one_row(_generator(case.seed, _ROW_STREAM + n), n, None)
    made["A"] = make(_generator(case.seed, 0), case.seq_len, 0)
    made["B"] = make(_generator(case.seed, -1), case.seq_len, 1)
    return made


def lengths_at(subject: Subject, case: Case, tp_size: int) -> list[int]:
    """Return the lengths that a case runs at one degree; none where they are the subject's own."""
    function = subject.options.inputs
    if function is not None and not _takes_shape(function):
        return []
    swept = sweep_lengths(case.seq_len, (tp_size,)) if subject.options.sweep else []
    return [*swept, case.seq_len]


def more_inputs(subject: Subject, case: Case) -> Inputs:
    """Return MORE further inputs of A's shape, C1, C2, ...: for what A and B leave to chance.

    Raises:
        SubjectError: as `make_inputs`.
    """
    make, _ = _maker(subject, case)
    return {
        f"C{n}": make(_generator(case.seed, -1 - n), case.seq_len, None) for n in range(1, MORE + 1)
    }


def _maker(subject: Subject, case: Case) -> tuple[Make, bool]:
    """Return how to draw an input of a length, and whether the length makes a difference."""
    function, vocab = subject.options.inputs, subject.options.vocab_size
    if function is None:
        return (
            lambda generator, length, turn: (
                token_ids(generator, vocab, case.batch, length, turn=turn),
            ),
            True,
        )
    users = lambda generator, length, _: _users_inputs(subject, generator, case.batch, length)  # noqa: E731
    return users, _takes_shape(function)


def input_order(inputs: Inputs, tp_size: int | None = None) -> tuple[str, ...]:
    """Return the ids to run: A, the sweep's lengths (those of one degree if given), then B, A, A.

    A is first at every degree: what a first call alone shows is held against its like. There are
    others between A and B: of two or three buffers that take turns one would else hold A's own. Two
    A's in a row: what goes round, in however many calls, is not where it was at both of them.
    """
    lengths = [key for key in inputs if key.startswith(("t", "row"))]
    if tp_size is not None:
        wanted = {f"t{n}" for n in (1, tp_size - 1, tp_size, tp_size + 1)}
        wanted |= {f"row{n}" for n in (1, tp_size + 1)}
        lengths = [key for key in lengths if key in wanted]
    return ("A", *(lengths or ["B"]), "B", "A", "A")


def fewer_inputs(inputs: Inputs, case: Case) -> Iterator[tuple[Inputs, str]]:
    """Yield what is left for a subject that cannot take them all, and why it is: of all lengths
    those with the case's rows, then those of its length."""
    for prefixes, why in (
        (("row",), f"one row; only inputs of {case.batch} rows were run"),
        (("row", "t"), f"other lengths than {case.seq_len}; only inputs of that were run"),
    ):
        fewer = {key: value for key, value in inputs.items() if not key.startswith(prefixes)}
        if len(fewer) < len(inputs):
            yield fewer, f"inputs: TP=1 raises for {why}"


def token_ids(
    generator: torch.Generator, vocab: int, batch: int, length: int, *, turn: int | None = None
) -> torch.Tensor:
    """Return int64 [batch, length] below `vocab`; tokens and rows differ wherever they can.

    Args:
        turn: 0 or 1 for every second of the most telling ids (inputs: [Shard Edges]), as many as
            there is room for; None for none in particular.
    """
    count = batch * length
    telling, others = _shard_edges(vocab)
    first = telling[:0] if turn is None else telling[turn::2]
    others = others[torch.randperm(len(others), generator=generator)]
    edges = torch.cat([first, others[~torch.isin(others, first)]])[: count // 2]
    rest = torch.randperm(vocab, generator=generator)
    pool = torch.cat([edges, rest[~torch.isin(rest, edges)]])
    pool = pool.repeat(-(-count // vocab))[:count]
    ids = pool[torch.randperm(count, generator=generator)].view(batch, length)
    if vocab >= batch and len(set(ids[:, 0].tolist())) < batch:
        ids[:, 0] = torch.randperm(vocab, generator=generator)[:batch]
    return ids


@functools.cache
def _shard_edges(vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids on both sides of shards' edges: of those that tell most, and of others.

    One edge in the middle tells what is wrong at every edge; there is one for each degree and way
    of padding. The others are all edges of a vocabulary that is padded no more than it has to be.
    """
    rows = {tp_size: _rows_per_rank(vocab, tp_size) for tp_size in _EDGE_DEGREES}
    middle = [
        tp_size // 2 * each
        for way in zip(*rows.values(), strict=True)
        for tp_size, each in zip(rows, way, strict=True)
    ]
    every = [rank * each for tp_size, (each, *_) in rows.items() for rank in range(tp_size)]
    return _around(middle, vocab), _around([*every, vocab], vocab).sort().values


def _around(edges: Sequence[int], vocab: int) -> torch.Tensor:
    """Return the ids on both sides of edges, each once."""
    ids = dict.fromkeys(id_ for edge in edges for id_ in (edge - 1, edge))
    return torch.tensor([id_ for id_ in ids if 0 <= id_ < vocab], dtype=torch.int64)


def _rows_per_rank(vocab: int, tp_size: int) -> tuple[int, ...]:
    """Return how many rows of the vocabulary a rank has: padded to a multiple of tp, to one of 64
    (of 64 * tp where that does not divide), to one of 128 * tp.

    Source: TensorRT-LLM and torch.chunk; vLLM and SGLang; Megatron-LM (engines/).
    """

    def rows(quantum: int) -> int:
        return -(-vocab // quantum) * quantum // tp_size

    serving = 64 if rows(64) * tp_size == -(-vocab // 64) * 64 else 64 * tp_size
    return rows(tp_size), rows(serving), rows(128 * tp_size)


def _users_inputs(
    subject: Subject, generator: torch.Generator, batch: int, length: int
) -> tuple[torch.Tensor, ...]:
    function = subject.options.inputs
    assert function is not None
    arguments = (generator, batch, length) if _takes_shape(function) else (generator,)
    try:
        made: Any = function(*arguments)
    except Exception as error:
        raise SubjectError(
            f"{subject.name}: inputs() raised {type(error).__name__}: {error}"
        ) from error
    made = made if isinstance(made, (tuple, list)) else (made,)
    for tensor in made:
        if not isinstance(tensor, torch.Tensor):
            raise SubjectError(
                f"{subject.name}: inputs() returned {type(tensor).__name__},"
                " but should return a tensor or a tuple of tensors"
            )
    return tuple(tensor.detach().to("cpu") for tensor in made)


def _takes_shape(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + stream * 7919 + 12345) % 2**63)
