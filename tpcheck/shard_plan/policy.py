"""How a split may be made where sizes do not divide: what is padded, copied or left uneven.

Requirement: every way that an engine chooses is a value here, so that one plan, one decoder and one
set of properties judge them all. The default refuses whatever does not divide.

[Whole Blocks] Under a quantization block or kernel tile every rank's piece starts at a block of the
whole tensor and is a whole number of blocks wide. Head and block rules hold jointly: padding 64
heads of 64 for six ranks to 66 cuts blocks of 128 (sgl-project/sglang#8243); 72 is the least count
that does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.errors import PlanError

WAYS = ("even", "pad", "uneven")
KV_WAYS = ("shard_or_replicate", "unaligned", "mha")
SCALE_WAYS = ("refuse", "replicate", "finer")
_ALLOWED = {"heads": WAYS, "kv": KV_WAYS, "intermediate": WAYS, "scales": SCALE_WAYS}


@dataclass(frozen=True, slots=True)
class SplitPolicy:
    """What may be done where sizes do not divide by tp_size.

    `heads` and `intermediate`: "even" refuses; "pad" gives every rank as many, zeros behind the
    real ones; "uneven" gives the first ranks one more. With more KV heads than ranks, whole KV
    groups are what is padded or dealt out; with fewer, the query heads of one group.

    `kv`: "shard_or_replicate" splits KV heads, or copies each to equally many ranks; "unaligned"
    splits query heads anywhere and gives a rank every KV head that they touch; "mha" gives each
    query head a copy of its own.

    `vocab_quantum`: a rank's rows are a multiple of it, so that the padded vocabulary is one of
    vocab_quantum * tp_size. `block`: policy: [Whole Blocks], of head and intermediate widths.

    `scales`: what becomes of a quantization block or group that a cut goes through. "refuse": there
    is no such cut, pads and uneven pieces are whole blocks; "replicate" and "finer": quant:
    [Straddling].
    """

    heads: str = "even"
    kv: str = "shard_or_replicate"
    intermediate: str = "even"
    vocab_quantum: int = 1
    block: int = 1
    scales: str = "refuse"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"policy: {name}={getattr(self, name)!r}, but should be one of"
                    f" {', '.join(allowed)}"
                )
        for name in ("vocab_quantum", "block"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(
                    f"policy: {name}={value!r}, but should be a whole number of at least 1"
                )


STRICT = SplitPolicy()
"""Nothing but the vocabulary is padded, and KV heads are copied evenly; the default."""
