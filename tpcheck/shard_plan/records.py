"""What a plan says: which heads, features and rows every rank holds, in integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tpcheck.shard_plan.policy import STRICT, SplitPolicy


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
    """What one rank holds: real heads, features and rows only, never pads. Any may be empty.

    `kv_heads` are those that its query heads attend with. `intermediate` is empty where experts
    take the MLP's place; the other two where none do.
    """

    query_heads: Span
    kv_heads: Span
    intermediate: Span
    vocab: Span
    moe_intermediate: Span
    shared_expert_intermediate: Span


class Padded(NamedTuple):
    """How many of each every rank has, pads included; 0 where nothing is padded."""

    query: int = 0
    kv: int = 0
    intermediate: int = 0
    moe_intermediate: int = 0
    shared_expert_intermediate: int = 0


NOTHING_PADDED = Padded()


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The split of one spec over `tp_size` ranks, in rank order.

    At most `kv_replicas` ranks hold one KV head; where KV heads are shared out evenly, exactly so
    many. `vocab_rows` is what every rank's embedding and head have, pads included;
    `padded_vocab_size` is their sum.
    """

    tp_size: int
    kv_replicas: int
    vocab_rows: int
    ranks: tuple[RankPlan, ...]
    policy: SplitPolicy = STRICT
    padded: Padded = NOTHING_PADDED

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary with its padding."""
        return self.vocab_rows * self.tp_size
