"""Degrees and shapes: what Hypothesis generates before a model is made of it.

Requirement: both sides of every rule are reached on purpose (`legal`), with the head counts,
widths and vocabularies at which real code went wrong, and what is drawn shrinks to the smallest
shape that still shows it. Sizes keep Hugging Face's names: `shape._asdict()` gives fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tpcheck.errors import TPCheckError
from tpcheck.strategies import tables
from tpcheck.strategies.tables import Question, pick, questions

DTYPES = ("bfloat16", "float16", "float32")

PUBLISHED_VOCAB_SIZES = (32003, 49159, 50257, 129280, 151936)
"""32003 is prime, 49159 and 50257 are odd, 129280 divides by 8 but not by 3, 151936 by 128."""

LEAST_VOCAB, LEAST_HIDDEN = 8, 4
"""Fewer than 8 logits say little about drift; a norm over fewer than 4 features says nothing."""

_SMALL_VOCAB = 64


class HeadCounts(NamedTuple):
    """The heads of one attention."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class MLPShape(NamedTuple):
    """The sizes of one MLP; `mlp` is "gated" or "plain"."""

    hidden_size: int
    intermediate_size: int
    mlp: str


class LayerShape(NamedTuple):
    """The sizes of one layer: its heads and its MLP over one hidden_size."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    mlp: str


def tp_degrees(
    max_size: int = 8, min_size: int = 2, *, sizes: Sequence[int] | None = None
) -> st.SearchStrategy[int]:
    """Draw a TP degree from 2, 3, 4, 6, 8, 12, ... up to and always including `max_size`.

    Degrees above the number of KV heads come from drawing both.

    For tests whose degrees are their own matter, 3, 6 and 12 included. Those of a test that should
    follow pytest's `--tp` come from `tpcheck.pytest_plugin.tp_degrees`.

    Args:
        min_size: 1 to try the group of one, too.
        sizes: exactly these degrees instead.

    Raises:
        TPCheckError: no degree is left, or one is malformed.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import tp_degrees
        >>> find(tp_degrees(), lambda tp_size: tp_size > 6)
        8
        >>> find(tp_degrees(5), lambda tp_size: tp_size > 4)
        5
    """
    if sizes is None:
        between = {*tables.DEGREES, max_size}
        sizes = [size for size in between if min_size <= size <= max_size]
        if not sizes:
            raise TPCheckError(
                f"tp_degrees: max_size={max_size}, but should be at least min_size={min_size}"
            )
    tables.require_degrees("tp_degrees", sizes)
    return st.sampled_from(sorted(set(sizes)))


def head_counts(
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    max_heads: int | None = None,
    max_head_dim: int = 16,
) -> st.SearchStrategy[HeadCounts]:
    """Draw query heads, KV heads and an even head_dim: MHA, GQA, MQA, fewer KV heads than ranks.

    Args:
        tp_size: a degree, or several that `legal` holds for at once; by default one of 2, 3, 4, 6
            and 8, drawn.
        legal: True for what the plan accepts at every given degree, False for what it refuses at
            every one, None for either.
        max_heads: by default 64, more where the degrees need it.

    Raises:
        TPCheckError: a degree or bound is malformed, or nothing within the bounds is on this side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import head_counts
        >>> heads = find(head_counts(4, legal=True), lambda heads: heads.num_key_value_heads < 4)
        >>> heads.num_attention_heads % 4, 4 % heads.num_key_value_heads, heads.head_dim % 2
        (0, 0, 0)
    """
    require_at_least("head_counts", "max_head_dim", max_head_dim, 2)
    asked = questions("head_counts", tp_size, legal, max_heads=max_heads, among=tables.head_answers)
    return _head_counts(asked, max_head_dim)


@st.composite
def _head_counts(draw: st.DrawFn, asked: tuple[Question, ...], max_head_dim: int) -> HeadCounts:
    question = draw(st.sampled_from(asked))
    heads = pick(draw, tables.head_answers(question))
    return HeadCounts(*heads, head_dim=draw(head_dims(max_head_dim)))


def head_dims(max_head_dim: int, *, even: bool = True) -> st.SearchStrategy[int]:
    """Draw a head_dim; even where rope turns pairs."""
    return st.integers(1, max_head_dim // 2).map(_double) if even else st.integers(1, max_head_dim)


def _double(half: int) -> int:
    return 2 * half


def mlp_shapes(
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    max_hidden: int = 64,
    max_intermediate: int | None = None,
) -> st.SearchStrategy[MLPShape]:
    """Draw an MLP's sizes: odd shards, and widths that divide only where gate and up are fused.

    Args:
        tp_size: as in `head_counts`.
        legal: as in `head_counts`.
        max_intermediate: by default 128, more where the degrees need it.

    Raises:
        TPCheckError: a degree or bound is malformed, or nothing within the bounds is on this side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import mlp_shapes
        >>> shape = find(mlp_shapes(4, legal=False), lambda shape: shape.intermediate_size % 2 == 0)
        >>> shape.intermediate_size % 4, 2 * shape.intermediate_size % 4
        (2, 0)
    """
    require_at_least("mlp_shapes", "max_hidden", max_hidden, LEAST_HIDDEN)
    asked = questions(
        "mlp_shapes",
        tp_size,
        legal,
        max_intermediate=max_intermediate,
        among=tables.width_answers,
    )
    return _mlp_shapes(asked, max_hidden)


@st.composite
def _mlp_shapes(draw: st.DrawFn, asked: tuple[Question, ...], max_hidden: int) -> MLPShape:
    question = draw(st.sampled_from(asked))
    width = pick(draw, tables.width_answers(question))
    hidden = draw(st.integers(LEAST_HIDDEN, max_hidden))
    return MLPShape(hidden, width, draw(st.sampled_from(("gated", "plain"))))


def layer_shapes(
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    max_hidden: int = 64,
    max_heads: int | None = None,
    max_intermediate: int | None = None,
    max_head_dim: int = 16,
) -> st.SearchStrategy[LayerShape]:
    """Draw the sizes of a whole layer; illegal ones break one rule or several.

    hidden_size is heads times head_dim in some draws and independent of it in the others.

    Args:
        tp_size: as in `head_counts`.
        legal: as in `head_counts`.

    Raises:
        TPCheckError: a degree or bound is malformed, or nothing within the bounds is on this side.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import layer_shapes
        >>> shape = find(layer_shapes((2, 3), legal=True), lambda shape: shape.mlp == "plain")
        >>> shape.num_attention_heads % 6, shape.intermediate_size % 6
        (0, 0)
    """
    require_at_least("layer_shapes", "max_hidden", max_hidden, LEAST_HIDDEN)
    require_at_least("layer_shapes", "max_head_dim", max_head_dim, 2)
    asked = questions(
        "layer_shapes", tp_size, legal, max_heads=max_heads, max_intermediate=max_intermediate
    )
    return _layer_shapes(asked, max_hidden, max_head_dim)


@st.composite
def _layer_shapes(
    draw: st.DrawFn, asked: tuple[Question, ...], max_hidden: int, max_head_dim: int
) -> LayerShape:
    question = draw(st.sampled_from(asked))
    return draw_layer(draw, question, max_hidden, max_head_dim)


def draw_layer(
    draw: st.DrawFn,
    question: Question,
    max_hidden: int,
    max_head_dim: int,
    *,
    even_head_dim: bool = True,
) -> LayerShape:
    """Draw a layer that answers the question, with the fields that it pins."""
    pins: dict[str, Any] = dict(question.pins)
    head_group, width_group = draw(tables.pair_picks(question))
    heads, kv_heads = draw(head_group.picks)
    width = draw(width_group.picks)
    head_dim = pins.get("head_dim") or draw(head_dims(max_head_dim, even=even_head_dim))
    hidden = pins.get("hidden_size") or _draw_hidden(draw, max_hidden, heads * head_dim)
    mlp = pins.get("mlp") or draw(st.sampled_from(("gated", "plain")))
    return LayerShape(heads, kv_heads, head_dim, hidden, width, mlp)


def _draw_hidden(draw: st.DrawFn, max_hidden: int, features: int) -> int:
    equal = draw(st.booleans())
    other = draw(st.integers(LEAST_HIDDEN, max_hidden))
    return features if equal and LEAST_HIDDEN <= features <= max_hidden else other


def vocab_sizes(max_size: int | None = None, min_size: int = LEAST_VOCAB) -> st.SearchStrategy[int]:
    """Draw a vocabulary size: small ones, primes, powers of two and one off, published ones.

    Raises:
        TPCheckError: max_size is below min_size.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import vocab_sizes
        >>> find(vocab_sizes(), lambda size: size % 8 and size > 50000)
        50257
    """
    if max_size is not None and max_size < min_size:
        raise TPCheckError(
            f"vocab_sizes: max_size={max_size}, but should be at least min_size={min_size}"
        )
    require_at_least("vocab_sizes", "min_size", min_size, 1)
    return tables.pick_equally(*_vocab_families(max_size, min_size))


@lru_cache(maxsize=64)
def vocab_sizes_for(tp_sizes: tuple[int, ...], max_size: int) -> st.SearchStrategy[int]:
    """Draw as `vocab_sizes` does, the first that all degrees divide first.

    Whether the vocabulary is padded then depends on one draw, and not on it and the degree: a
    failure that needs padding, or its absence, still shrinks to the smallest degree.
    """
    least = math.lcm(*tp_sizes)
    even = range(least * -(-LEAST_VOCAB // least), _SMALL_VOCAB + 1)
    return tables.pick_equally(even, *_vocab_families(max_size, LEAST_VOCAB))


def _vocab_families(max_size: int | None, min_size: int) -> list[list[int]]:
    families = (
        range(min_size, max(min_size, _SMALL_VOCAB) + 1),
        _PRIMES,
        sorted(2**power + off for power in range(3, 13) for off in (-1, 0, 1)),
        PUBLISHED_VOCAB_SIZES,
    )
    largest = max_size or max(PUBLISHED_VOCAB_SIZES[-1], min_size)
    return [[size for size in family if min_size <= size <= largest] for family in families]


def _primes(limit: int) -> tuple[int, ...]:
    return tuple(n for n in range(2, limit) if all(n % d for d in range(2, int(n**0.5) + 1)))


_PRIMES = _primes(1100)


def token_counts(tp_size: int = 2, max_size: int = 16) -> st.SearchStrategy[int]:
    """Draw how many tokens there are: 1, tp-1, tp, tp+1, twice that, primes, and any up to a bound.

    Raises:
        TPCheckError: the degree or the bound is malformed.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import token_counts
        >>> find(token_counts(4, max_size=5), lambda tokens: tokens > 4)
        5
    """
    tables.require_degrees("token_counts", (tp_size,))
    require_at_least("token_counts", "max_size", max_size, 1)
    edges = {1, *(many * tp_size + off for many in (1, 2) for off in (-1, 0, 1))}
    edges |= set(_PRIMES)
    special = sorted(count for count in edges if 1 <= count <= max_size)
    return tables.pick_equally(special, range(1, max_size + 1))


def dtypes(names: Sequence[str] = DTYPES) -> st.SearchStrategy[str]:
    """Draw the name of a deployed dtype, bfloat16 first.

    Raises:
        TPCheckError: a name is none of bfloat16, float16 and float32.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import dtypes
        >>> find(dtypes(), lambda dtype: dtype.startswith("b"))
        'bfloat16'
    """
    for name in names or (None,):
        if name not in DTYPES:
            raise TPCheckError(f"dtypes: {name!r}, but should be one of {', '.join(DTYPES)}")
    return st.sampled_from(tuple(names))


def require_at_least(where: str, name: str, value: int, least: int) -> None:
    """Raise unless a bound is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise TPCheckError(
            f"{where}: {name}={value!r}, but should be a whole number of at least {least}"
        )
