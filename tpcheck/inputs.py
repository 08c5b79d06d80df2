"""The inputs of a case: made once, the same at every degree, chosen not to hide bugs.

Requirement: batch rows differ (a hook that returns output[0] is invisible when rows are equal),
lengths 1, tp-1, tp, tp+1 and the longest are all tried, and the longest runs as A, B, A on one
built subject so that state leaking from call to call shows. Long comes before short, because what
a longer call left in a buffer shows in the shorter one after it. Token ids are as different as they
can be, and every second one stands at the edge of a vocabulary shard, where masks go wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tpcheck.errors import SubjectError
from tpcheck.spec import Case
from tpcheck.subjects import Subject

Inputs = Mapping[str, tuple[torch.Tensor, ...]]

Make = Callable[[torch.Generator, int], tuple[torch.Tensor, ...]]

MORE = 8
"""Further inputs: with A and B they make a ratio of errors three times as sure."""

_EDGE_DEGREES = (2, 3, 4, 8)
"""Fixed, so that a case has the same inputs whatever degrees are asked for."""


def sweep_lengths(seq_len: int, tp_sizes: Sequence[int]) -> list[int]:
    """Return 1, tp-1, tp, tp+1 for every degree, as far as they are shorter than `seq_len`."""
    wanted = {1} | {tp + step for tp in tp_sizes for step in (-1, 0, 1)}
    return sorted(length for length in wanted if 1 <= length < seq_len)


def make_inputs(subject: Subject, case: Case, tp_sizes: Sequence[int]) -> Inputs:
    """Return input id -> arguments of forward: `t<length>` for the sweep, then A and B.

    Raises:
        SubjectError: the subject's own `inputs` raises or returns something else than tensors.
    """
    make, takes_length = _maker(subject, case)
    sweeps = subject.options.sweep and takes_length
    lengths = sweep_lengths(case.seq_len, tp_sizes) if sweeps else []
    made = {f"t{n}": make(_generator(case.seed, n), n) for n in reversed(lengths)}
    made["A"] = make(_generator(case.seed, 0), case.seq_len)
    made["B"] = make(_generator(case.seed, -1), case.seq_len)
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
    return {f"C{n}": make(_generator(case.seed, -1 - n), case.seq_len) for n in range(1, MORE + 1)}


def _maker(subject: Subject, case: Case) -> tuple[Make, bool]:
    """Return how to draw an input of a length, and whether the length makes a difference."""
    function, vocab = subject.options.inputs, subject.options.vocab_size
    if function is None:
        return lambda generator, length: (token_ids(generator, vocab, case.batch, length),), True
    users = lambda generator, length: _users_inputs(subject, generator, case.batch, length)  # noqa: E731
    return users, _takes_shape(function)


def input_order(inputs: Inputs, tp_size: int | None = None) -> tuple[str, ...]:
    """Return the ids to run: the sweep's lengths (those of one degree if given), then A, B, A."""
    lengths = [key for key in inputs if key.startswith("t")]
    if tp_size is not None:
        wanted = {f"t{n}" for n in (1, tp_size - 1, tp_size, tp_size + 1)}
        lengths = [key for key in lengths if key in wanted]
    return (*lengths, "A", "B", "A")


def token_ids(generator: torch.Generator, vocab: int, batch: int, length: int) -> torch.Tensor:
    """Return int64 [batch, length] below `vocab`; tokens and rows differ wherever they can."""
    count = batch * length
    edges = _shard_edges(vocab)
    edges = edges[torch.randperm(len(edges), generator=generator)][: count // 2]
    rest = torch.randperm(vocab, generator=generator)
    pool = torch.cat([edges, rest[~torch.isin(rest, edges)]])
    pool = pool.repeat(-(-count // vocab))[:count]
    ids = pool[torch.randperm(count, generator=generator)].view(batch, length)
    if vocab >= batch and len(set(ids[:, 0].tolist())) < batch:
        ids[:, 0] = torch.randperm(vocab, generator=generator)[:batch]
    return ids


@functools.cache
def _shard_edges(vocab: int) -> torch.Tensor:
    """Return the first and last ids of every rank's vocabulary shard."""
    edges = {0, vocab - 1}
    for tp_size in _EDGE_DEGREES:
        rows = -(-vocab // tp_size)
        edges |= {rank * rows - step for rank in range(1, tp_size) for step in (0, 1)}
    return torch.tensor(sorted(edge for edge in edges if edge < vocab))


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
