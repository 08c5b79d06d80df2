"""Every decision of a tensor-parallel split at one degree, before a weight moves.

Requirement: head, KV-group, FFN and vocabulary ranges are decided in the model's own vocabulary and
in integers only. Dividing tensor sizes instead goes wrong without an error: hidden_size=288 with
6 heads of 48 divides by 4, and four ranks then compute with heads of 72.

[Padding] The vocabulary is padded to a multiple of tp_size. Ranks hold equal row counts, the pads
lie behind the last real row, and they are cut off the gathered logits.
[KV Replication] With more ranks than KV heads, tp_size / num_key_value_heads neighbours hold a copy
of one KV head each, the one that their query heads attend with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tpcheck.errors import IllegalDegreeError
from tpcheck.spec import ModelSpec


class Span(NamedTuple):
    """Indices from `start` up to but without `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices there are."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank holds. `vocab` is the real rows only: it may be short, or empty, at the end.

    `intermediate` is empty where experts take the MLP's place; the other two where none do.
    """

    query_heads: Span
    kv_heads: Span
    intermediate: Span
    vocab: Span
    moe_intermediate: Span
    shared_expert_intermediate: Span


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The split of one spec over `tp_size` ranks, in rank order.

    `kv_replicas` ranks hold each KV head. `vocab_rows` is what every rank's embedding and head
    have, pads included; `padded_vocab_size` is their sum.
    """

    tp_size: int
    kv_replicas: int
    vocab_rows: int
    ranks: tuple[RankPlan, ...]

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary with its padding."""
        return self.vocab_rows * self.tp_size


def make_shard_plan(spec: ModelSpec, tp_size: int) -> ShardPlan:
    """Decide what each of `tp_size` ranks holds.

    Raises:
        IllegalDegreeError: heads, KV heads or the width of the MLP or its experts cannot be split
            this way; names every broken rule with its numbers and the degrees that fit.
    """
    problems = _problems(spec, tp_size)
    if problems:
        up_to = max(12, 2 * tp_size) if isinstance(tp_size, int) else 12
        legal = legal_tp_sizes(spec, up_to)
        first, *rest = problems
        lines = [f"{first.line} [{spec.model_type}, tp_size={tp_size}]"]
        lines += [f"  {text}" for text in first.consequences]
        for problem in rest:
            lines += [f"  {text}" for text in (problem.line, *problem.consequences)]
        lines.append(f"  tp_size that fit this spec, up to {up_to}: {', '.join(map(str, legal))}")
        raise IllegalDegreeError("\n".join(lines), legal_tp_sizes=legal)
    vocab_rows = -(-spec.vocab_size // tp_size)
    return ShardPlan(
        tp_size=tp_size,
        kv_replicas=max(1, tp_size // spec.num_key_value_heads),
        vocab_rows=vocab_rows,
        ranks=tuple(_rank_plan(spec, tp_size, rank, vocab_rows) for rank in range(tp_size)),
    )


def legal_tp_sizes(spec: ModelSpec, up_to: int = 64) -> tuple[int, ...]:
    """Return every degree from 1 to `up_to` that the reference decoder can run, ascending."""
    return tuple(size for size in range(1, up_to + 1) if not _problems(spec, size))


def _rank_plan(spec: ModelSpec, tp_size: int, rank: int, vocab_rows: int) -> RankPlan:
    kv_heads = spec.num_key_value_heads
    if tp_size > kv_heads:
        head = rank // (tp_size // kv_heads)
        kv_span = Span(head, head + 1)
    else:
        kv_span = _piece(kv_heads, tp_size, rank)
    first_row = rank * vocab_rows
    dense, routed, shared = (_piece(width.size, tp_size, rank) for width in _widths(spec))
    return RankPlan(
        query_heads=_piece(spec.num_attention_heads, tp_size, rank),
        kv_heads=kv_span,
        intermediate=dense,
        vocab=Span(min(first_row, spec.vocab_size), min(first_row + vocab_rows, spec.vocab_size)),
        moe_intermediate=routed,
        shared_expert_intermediate=shared,
    )


class _Width(NamedTuple):
    where: str
    name: str
    size: int


def _widths(spec: ModelSpec) -> tuple[_Width, _Width, _Width]:
    """Return what is split by features, 0 wide where the spec has no such part."""
    dense = 0 if spec.num_experts else spec.intermediate_size
    shared = spec.shared_expert_intermediate_size
    return (
        _Width("layers.*.mlp", "intermediate_size", dense),
        _Width("layers.*.mlp.experts.*", "moe_intermediate_size", spec.moe_intermediate_size),
        _Width("layers.*.mlp.shared_expert", "shared_expert_intermediate_size", shared),
    )


def _piece(total: int, parts: int, index: int) -> Span:
    size = total // parts
    return Span(index * size, (index + 1) * size)


class _Problem(NamedTuple):
    line: str
    consequences: tuple[str, ...] = ()


def _problems(spec: ModelSpec, tp_size: int) -> list[_Problem]:
    """Return every rule that this degree breaks; empty when it is legal."""
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        return [_Problem(f"tp_size={tp_size!r}, but should be a whole number of at least 1")]
    found = []
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    if heads % tp_size:
        found.append(
            _Problem(
                f"layers.*.self_attn: num_attention_heads={heads},"
                f" but should be divisible by tp_size={tp_size}",
                _silent_heads(spec, tp_size),
            )
        )
    elif kv_heads % tp_size and tp_size % kv_heads:
        found.append(
            _Problem(
                f"layers.*.self_attn: num_key_value_heads={kv_heads},"
                f" but should divide tp_size={tp_size} or be divisible by it",
                ("some ranks' query heads would need parts of two KV groups",),
            )
        )
    for where, name, size in _widths(spec):
        if size % tp_size:
            line = f"{where}: {name}={size}, but should be divisible by tp_size={tp_size}"
            found.append(_Problem(line))
    return found


def _silent_heads(spec: ModelSpec, tp_size: int) -> tuple[str, ...]:
    """Say what slicing by size alone would do to the heads, where nothing would stop it."""
    heads = spec.num_attention_heads
    width = heads * spec.head_dim
    if width % tp_size:
        return ()
    name = "hidden_size" if width == spec.hidden_size else "num_attention_heads * head_dim"
    columns, local_heads = width // tp_size, heads // tp_size
    silent = f"{name}={width} divides by {tp_size}, so slicing alone would succeed and silently"
    if local_heads and columns % local_heads == 0:
        return (f"{silent} give head_dim={columns // local_heads} instead of {spec.head_dim}",)
    return (f"{silent} give {columns} columns, not whole heads of {spec.head_dim}",)
