"""Ways to split a model where its sizes do not divide: what the plan may pad, copy or leave uneven.

Requirement: every way is drawn, alone and with others, and on the side of the plan's rules that is
asked for; the plan itself says which ways a model and a degree allow. What fails shrinks to the
strict policy, one field after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.shard_plan.policy import KV_WAYS, SCALE_WAYS, WAYS, SplitPolicy
from tpcheck.shard_plan.rules import head_problems, width_problems
from tpcheck.shard_plan.scale_rules import fused_problems
from tpcheck.spec import ModelSpec
from tpcheck.strategies.tables import require_degrees

BLOCKS = (1, 2, 4, 8, 16, 3)
QUANTA = (1, 2, 5, 64)


def split_policies(
    spec: ModelSpec | None = None,
    tp_size: int | None = None,
    legal: bool | None = None,
    *,
    blocks: Sequence[int] = BLOCKS,
    vocab_quanta: Sequence[int] = QUANTA,
) -> st.SearchStrategy[SplitPolicy]:
    """Draw a policy: what a plan may do with heads, KV heads, widths, vocabulary, blocks, scales.

    Args:
        spec: with `tp_size`, the model that `legal` speaks of.
        tp_size: the degree that it speaks of.
        legal: True for policies that plan, False for those that are refused, None for either.
        blocks: block sizes to draw from.
        vocab_quanta: vocabulary quanta to draw from.

    Raises:
        TPCheckError: `legal` is given without a spec and a degree, or a degree is malformed.
        PlanError: no policy is on the asked side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.spec import ModelSpec
        >>> from tpcheck.strategies import split_policies
        >>> spec = ModelSpec(64, 40, 40, 1, 5)
        >>> find(split_policies(spec, 4, legal=True), lambda policy: policy.block == 1).heads
        'pad'
    """
    if legal is None:
        return _any(blocks, vocab_quanta)
    if spec is None or tp_size is None:
        raise TPCheckError(
            f"split_policies: legal={legal}, but spec and tp_size should be given for that"
        )
    require_degrees("split_policies", (tp_size,))
    found: list[st.SearchStrategy[SplitPolicy]] = []
    for scales in _SCALES if spec.quantization else (SCALE_WAYS,):
        fuses = not fused_problems(spec, tp_size, SplitPolicy(scales=scales[0]))
        for block in dict.fromkeys(blocks):
            heads, refused_heads = _heads(spec, tp_size, block, scales[0])
            widths, refused_widths = _widths(spec, tp_size, block, scales[0])
            sides = [(heads, widths)] if fuses else []
            if not legal:
                sides = [(refused_heads, widths + refused_widths), (heads, refused_widths)]
                sides += [] if fuses else [(heads, widths)]
            found += [
                _built(one, other, block, vocab_quanta, scales)
                for one, other in sides
                if one and other
            ]
    if not found:
        side = "plans" if legal else "is refused"
        raise PlanError(
            f"split_policies: no policy {side} at tp_size={tp_size} with blocks={list(blocks)}"
        )
    return st.one_of(found)


_SCALES = (SCALE_WAYS[:1], SCALE_WAYS[1:])
"""The plan refuses cut blocks, or it accepts them; how their scales are then held is not its rule.
"""

_Heads = list[tuple[str, str]]


def _heads(spec: ModelSpec, tp_size: int, block: int, scales: str) -> tuple[_Heads, _Heads]:
    """Return the (heads, kv) that plan, and those that are refused."""
    plans: _Heads = []
    refused: _Heads = []
    for way in WAYS:
        for kv in KV_WAYS:
            policy = SplitPolicy(heads=way, kv=kv, block=block, scales=scales)
            (refused if head_problems(spec, tp_size, policy) else plans).append((way, kv))
    return plans, refused


def _widths(spec: ModelSpec, tp_size: int, block: int, scales: str) -> tuple[list[str], list[str]]:
    plans: list[str] = []
    refused: list[str] = []
    for way in WAYS:
        policy = SplitPolicy(intermediate=way, block=block, scales=scales)
        (refused if width_problems(spec, tp_size, policy) else plans).append(way)
    return plans, refused


def _built(
    heads: _Heads,
    widths: list[str],
    block: int,
    vocab_quanta: Sequence[int],
    scales: Sequence[str],
) -> st.SearchStrategy[SplitPolicy]:
    return st.builds(
        lambda pair, width, quantum, way: SplitPolicy(pair[0], pair[1], width, quantum, block, way),
        st.sampled_from(heads),
        st.sampled_from(widths),
        st.sampled_from(tuple(vocab_quanta)),
        st.sampled_from(tuple(scales)),
    )


def _any(blocks: Sequence[int], vocab_quanta: Sequence[int]) -> st.SearchStrategy[SplitPolicy]:
    return st.builds(
        SplitPolicy,
        st.sampled_from(WAYS),
        st.sampled_from(KV_WAYS),
        st.sampled_from(WAYS),
        st.sampled_from(tuple(vocab_quanta)),
        st.sampled_from(tuple(blocks)),
        st.sampled_from(SCALE_WAYS),
    )
