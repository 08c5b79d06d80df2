"""Quantizations of a model's weights: every format, and the sizes at which a split goes wrong.

Requirement: groups and blocks small enough to be whole in a small model are drawn as often as
published ones, with odd ones, words of packed codes cut in the middle, and every option of a
format; on the side of the plan's rules that is asked for.

[Settling] Whether a quantization fits a model is the plan's to say. One is drawn, and where it is
not on the asked side the next is taken that is: another size of the same format, then the plainest
of all. Nothing is thrown away, and no rule stands here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from hypothesis import strategies as st

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.quantization import FORMATS, Quantization
from tpcheck.shard_plan.policy import STRICT
from tpcheck.shard_plan.quant import IN, OUT
from tpcheck.shard_plan.rules import problems
from tpcheck.shard_plan.units import shared_features
from tpcheck.spec import ModelSpec
from tpcheck.strategies.tables import pick_equally, require_degrees

ACTIVATIONS = ("none", "token", "group")
KV_CACHES = ("none", "tensor", "head")

_GROUPS = (0, 2, 3, 4, 8, 12, 16, 24, 32, 64, 128)
"""0 is GPTQ's -1; 32, 64 and 128 are published; words of 8 codes cut through 3, 12 and 4."""

_BLOCKS = ((0, 8), (4, 8), (12, 8), (16, 4), (2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (32, 32))
_PUBLISHED_BLOCKS = ((128, 64), (64, 64), (128, 128))
"""(block_rows, group_size): of blocks that are not square a cut may fit one dim only."""

_SKIPS = ((), (), (), (), ("o_proj",), ("self_attn",), ("mlp",), ("down_proj",), ("layers.0.",))


class _Layout(NamedTuple):
    """What shares a scale, in one format."""

    format: str
    bits: int
    group_size: int
    block_rows: int = 1


class _Flags(NamedTuple):
    fused: bool = False
    asymmetric: bool = False
    desc_act: bool = False
    zeros_as_is: bool = False
    online: bool = False


_NO_FLAGS = _Flags()
_FLAGS = (
    *[_NO_FLAGS] * 16,  # a third of all
    *itertools.starmap(_Flags, itertools.product((False, True), repeat=len(_NO_FLAGS))),
)


def quantizations(
    spec: ModelSpec | None = None,
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    activations: Sequence[str] = ACTIVATIONS,
    kv_caches: Sequence[str] = KV_CACHES,
) -> st.SearchStrategy[Quantization]:
    """Draw how the weights of linear layers are stored.

    Args:
        spec: with `tp_size`, the model that `legal` speaks of, whatever its own quantization is.
        tp_size: a degree, or several that `legal` holds for at once.
        legal: True for what plans with the spec at every given degree, False for what is refused
            at every one, None for either.
        formats: names of formats to draw from.
        activations: what may share a scale among activations; where a format rounds none of them
            this way, they are not rounded.
        kv_caches: how the KV cache may be stored.

    Raises:
        TPCheckError: `legal` is given without a spec and a degree, or a degree or name is
            malformed.
        PlanError: no quantization of the spec is on the asked side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.spec import ModelSpec
        >>> from tpcheck.strategies import quantizations
        >>> spec = ModelSpec(64, 64, 96, 1, 8)
        >>> awq = quantizations(spec, 4, legal=True, formats=["awq"])
        >>> find(awq, lambda quantization: quantization.group_size > 4).group_size
        8
        >>> find(quantizations(spec, 4, legal=False), lambda quantization: True).describe()
        'fp8, group_size=3'
    """
    for name, given, known in (
        ("formats", formats, FORMATS),
        ("activations", activations, ACTIVATIONS),
        ("kv_caches", kv_caches, KV_CACHES),
    ):
        _require_known(name, given, known)
    formats = tuple(formats)
    drawn = drawn_from(formats, tuple(activations), tuple(kv_caches))
    if legal is None:
        return drawn
    if spec is None or tp_size is None:
        raise TPCheckError(
            f"quantizations: legal={legal}, but spec and tp_size should be given for that"
        )
    sizes = tuple(tp_size) if isinstance(tp_size, Sequence) else (tp_size,)
    require_degrees("quantizations", sizes)
    if all(fits(spec, one, sizes) != legal for one in _last_resorts(spec, formats)):
        side = "plans" if legal else "is refused"
        raise PlanError(
            f"quantizations: tp_size={tp_size}, but should be one at which some quantization"
            f" {side} [formats={', '.join(formats)}]"
        )
    return drawn.map(lambda one: settle(one, spec, sizes, legal, formats))


@lru_cache(maxsize=16)
def drawn_from(
    formats: tuple[str, ...] = FORMATS,
    activations: tuple[str, ...] = ACTIVATIONS,
    kv_caches: tuple[str, ...] = KV_CACHES,
) -> st.SearchStrategy[Quantization]:
    """Draw any quantization, each format as often as any other."""
    return st.builds(
        _made,
        pick_equally(*map(_layouts, formats)),
        st.sampled_from(_FLAGS),
        st.sampled_from(_SKIPS),
        st.sampled_from(activations),
        st.sampled_from(kv_caches),
    )


def settle(
    drawn: Quantization,
    spec: ModelSpec,
    tp_sizes: tuple[int, ...],
    legal: bool,
    formats: tuple[str, ...] = FORMATS,
) -> Quantization:
    """Return what was drawn, or the next that is on the asked side (quantizations: [Settling])."""
    judged: dict[object, bool | None] = {}
    for one in itertools.chain(_resized(drawn, legal), _last_resorts(spec, formats)):
        # the plan sees no more of a quantization than this, so each of them is asked once
        seen = (shared_features(one, OUT), shared_features(one, IN), one.fused, one.skip)
        if seen not in judged:
            judged[seen] = fits(spec, one, tp_sizes)
        if judged[seen] == legal:
            return one
    raise AssertionError(f"{spec} has no quantization that is {legal=} at {tp_sizes}")


def fits(spec: ModelSpec, quantization: Quantization, tp_sizes: tuple[int, ...]) -> bool | None:
    """Ask the plan whether it splits a spec stored this way at all degrees; None for at some."""
    stored = replace(spec, quantization=quantization)
    legal = {not problems(stored, size, STRICT) for size in tp_sizes}
    return legal.pop() if len(legal) == 1 else None


def _resized(drawn: Quantization, legal: bool) -> Iterator[Quantization]:
    """Yield the same in its own size and then in every other, first those likelier to be legal."""
    layouts = _layouts(drawn.format)
    own = layouts.index(_Layout(drawn.format, drawn.bits, drawn.group_size, drawn.block_rows))
    smaller, larger = reversed(layouts[:own]), layouts[own + 1 :]
    yield drawn
    for layout in (*smaller, *larger) if legal else (*larger, *smaller):
        yield _sized(drawn, layout)


def _last_resorts(spec: ModelSpec, formats: tuple[str, ...]) -> Iterator[Quantization]:
    """Yield every size of every format, and a group that is wider than the model."""
    for format_ in formats:
        for layout in _layouts(format_):
            yield _made(layout)
    widest = spec.intermediate_size + spec.num_attention_heads * spec.head_dim
    for format_ in formats:
        yield Quantization(format_, widest + 1)


@lru_cache(maxsize=16)
def _layouts(format_: str) -> tuple[_Layout, ...]:
    """Return the layouts of one format; fewer features share a scale in the first of them."""
    if format_ in ("fp8", "int8"):
        groups = ((1, group) for group in _GROUPS if group)
        sizes = ((1, 0), (0, 0), *groups, *_BLOCKS, *_PUBLISHED_BLOCKS)
        return tuple(_Layout(format_, 8, group, rows) for rows, group in sizes)
    if format_ in ("mxfp4", "nvfp4"):
        return tuple(_Layout(format_, 4, group) for group in _GROUPS if group)
    widths = (4,) if format_ == "awq" else (4, 8)
    return tuple(_Layout(format_, bits, group) for bits in widths for group in _GROUPS)


def _made(
    layout: _Layout,
    flags: _Flags = _NO_FLAGS,
    skip: tuple[str, ...] = (),
    activations: str = "none",
    kv_cache: str = "none",
) -> Quantization:
    """Return a quantization without the options that its format does not have."""
    zeros = layout.format in ("gptq", "awq", "pack-quantized")
    ordered, v2 = layout.format in ("gptq", "pack-quantized"), layout.format == "gptq"
    online = flags.online and layout.format in ("fp8", "int8")
    rounds = layout.format in ("fp8", "int8", "mxfp4")
    plain = Quantization(
        layout.format,
        layout.group_size,
        layout.block_rows,
        layout.bits,
        symmetric=not (flags.asymmetric and zeros),
        desc_act=flags.desc_act and ordered,
        zeros_as_is=flags.zeros_as_is and v2,
        fused=flags.fused and not online,
        online=online,
        kv_cache=kv_cache,
        skip=skip,
    )
    return _rounding(plain, activations if rounds else "none")


def _sized(drawn: Quantization, layout: _Layout) -> Quantization:
    plain = replace(
        drawn,
        bits=layout.bits,
        group_size=layout.group_size,
        block_rows=layout.block_rows,
        activations="none",
    )
    return _rounding(plain, drawn.activations)


def _rounding(plain: Quantization, activations: str) -> Quantization:
    """Return one that rounds activations this way, by token where there are no groups."""
    if activations == "group" and not plain.group_size:
        activations = "token"
    return replace(plain, activations=activations)


def _require_known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    for one in given or (None,):
        if one not in known:
            raise TPCheckError(
                f"quantizations: {name} has {one!r}, but should have some of {', '.join(known)}"
            )
