"""Whole decoders, and whole points of a search: spec, degree, dtype, batch, length and seed.

Requirement: every option of the reference decoder is drawn both ways, at every degree, on both
sides of the plan's rules, and what fails shrinks to something a person can read: degree 2, one
layer, the fewest heads, the narrowest widths, every option off, one token, seed 0.

[Draw Order] What matters most to a reader is drawn first, because Hypothesis shrinks what was drawn
first hardest: the degree, then layers, sizes, options, and the seed last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.spec import Case, ModelSpec, RopeScaling
from tpcheck.strategies import tables
from tpcheck.strategies.drawing import LARGEST_SEED, as_spec
from tpcheck.strategies.shapes import (
    DTYPES,
    LEAST_HIDDEN,
    draw_layer,
    require_at_least,
    token_counts,
    tp_degrees,
    vocab_sizes_for,
)
from tpcheck.strategies.shapes import dtypes as dtype_names
from tpcheck.strategies.tables import Question, questions

MAX_POSITIONS = 64
"""Of a drawn spec: a learned table of HF's 2048 rows would cost more than the rest of the model."""

_MAX_VOCAB = 131
"""A prime. Larger ones cost time and show no more on models this small."""

_SCALINGS = (
    None,
    RopeScaling("linear", 2.0),
    RopeScaling("llama3", 8.0, original_max_position_embeddings=32),
)
"""llama3 stretches wavelengths above 32 / 4: an original length of 8192 would stretch none here."""

_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "attention_bias": st.booleans(),
    "attention_out_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "lm_head_bias": st.booleans(),
    "qk_norm": st.sampled_from(("none", "per_head", "across_heads")),
    "norm_type": st.sampled_from(("rms", "layer")),
    "norm_eps": st.sampled_from((1e-6, 1e-5)),
    "hidden_act": st.sampled_from(("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")),
    "tie_word_embeddings": st.booleans(),
    "sliding_window": st.sampled_from((0, 0, 0, 0, 0, 1, 2, 3, 5, 8)),
    "rope_theta": st.sampled_from((10000.0, 500000.0, 100.0)),
    "rope_scaling": st.sampled_from(_SCALINGS),
}
_WITHOUT_ROPE = {"rope_theta": 10000.0, "rope_scaling": None}


@dataclass(frozen=True, slots=True)
class _Bounds:
    max_layers: int
    max_hidden: int
    max_head_dim: int
    vocab: st.SearchStrategy[int] | None

    def __post_init__(self) -> None:
        for name, least in (("max_layers", 1), ("max_hidden", LEAST_HIDDEN), ("max_head_dim", 2)):
            require_at_least("model_specs", name, getattr(self, name), least)
        if self.vocab is not None:
            _require_strategy("model_specs", "vocab", self.vocab)


def model_specs(
    tp_size: int | Sequence[int] | None = None,
    legal: bool | None = None,
    *,
    max_layers: int = 3,
    max_hidden: int = 64,
    max_heads: int | None = None,
    max_intermediate: int | None = None,
    max_head_dim: int = 16,
    vocab: st.SearchStrategy[int] | None = None,
    **pins: Any,
) -> st.SearchStrategy[ModelSpec]:
    """Draw a decoder with any of its options: heads, norms, biases, positions, window, vocabulary.

    Fields that no argument speaks of (those of a mixture of experts, model_type) keep their
    default unless pinned.

    Args:
        tp_size: a degree, or several that `legal` holds for at once; by default one of 2, 3, 4, 6
            and 8, drawn.
        legal: True for what the plan accepts at every given degree, False for what it refuses at
            every one, None for either.
        max_heads: by default 64, more where the degrees need it.
        max_intermediate: by default 128, more where the degrees need it.
        vocab: a strategy of vocabulary sizes; by default as `vocab_sizes(131)`.
        pins: fields of ModelSpec with the value they should have.

    Raises:
        PlanError: the pinned fields make no spec, or leave nothing on this side of the rules.
        TPCheckError: a degree or bound is malformed.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import model_specs
        >>> specs = model_specs(4, legal=True, mlp_bias=True)
        >>> spec = find(specs, lambda spec: spec.qk_norm == "per_head")
        >>> spec.mlp_bias, spec.num_attention_heads % 4, spec.intermediate_size % 4
        (True, 0, 0)
    """
    bounds = _Bounds(max_layers, max_hidden, max_head_dim, vocab)
    asked = questions(
        "model_specs",
        tp_size,
        legal,
        max_heads=max_heads,
        max_intermediate=max_intermediate,
        pins=pins,
    )
    return _model_specs(asked, bounds)


@st.composite
def _model_specs(draw: st.DrawFn, asked: tuple[Question, ...], bounds: _Bounds) -> ModelSpec:
    return _draw_model(draw, draw(st.sampled_from(asked)), bounds)


def _draw_model(draw: st.DrawFn, question: Question, bounds: _Bounds) -> ModelSpec:
    """Draw a spec that answers the question (models: [Draw Order])."""
    pins = dict(question.pins)
    drawn: dict[str, Any] = {}

    def field(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        drawn[name] = pins[name] if name in pins else draw(strategy)
        return drawn[name]

    field("num_hidden_layers", st.integers(1, bounds.max_layers))
    rope = field("position", st.sampled_from(("rope", "learned"))) == "rope"
    layer = draw_layer(draw, question, bounds.max_hidden, bounds.max_head_dim, even_head_dim=rope)
    drawn |= layer._asdict()
    vocab = bounds.vocab
    field("vocab_size", vocab_sizes_for(question.tp_sizes, _MAX_VOCAB) if vocab is None else vocab)
    for name, strategy in _OPTIONS.items():
        field(name, strategy)
    if not rope:
        drawn |= _WITHOUT_ROPE
    return ModelSpec(**({"max_position_embeddings": MAX_POSITIONS} | drawn | pins))


_Sources = tuple[tuple[int, st.SearchStrategy[ModelSpec]], ...]


@dataclass(frozen=True, slots=True)
class Point:
    """One thing to try: a model at a degree and dtype, on one input."""

    spec: ModelSpec
    tp_size: int
    dtype: str
    batch: int
    seq_len: int
    seed: int

    @property
    def case(self) -> Case:
        """The case that a run knows this point by: without degree and dtype."""
        return Case(self.seed, self.batch, self.seq_len, self.spec)


def points(
    tp_sizes: Sequence[int] | None = None,
    legal: bool | None = True,
    *,
    specs: st.SearchStrategy[Any] | None = None,
    dtypes: Sequence[str] = DTYPES,
    max_batch: int = 3,
    max_seq_len: int = 16,
    **options: Any,
) -> st.SearchStrategy[Point]:
    """Draw everything that a search varies, in an order that shrinks well (models: [Draw Order]).

    Args:
        tp_sizes: the degrees to draw from; those of `tp_degrees()` by default.
        legal: whether the spec is legal at the drawn degree; None for either.
        specs: a strategy of specs, or of dicts of their fields, in place of `model_specs`. A spec
            of which no degree is on the asked side is drawn again.
        dtypes: names of dtypes to draw from.
        options: of `model_specs`: bounds, and pinned fields.

    Raises:
        PlanError: pinned fields leave nothing to draw at a degree that was asked for.
        TPCheckError: a degree, bound or dtype is malformed.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import points
        >>> point = find(points(), lambda point: point.tp_size == 6 and point.dtype == "float16")
        >>> point.spec.num_attention_heads % 6, point.case.seed == point.seed
        (0, True)
    """
    require_at_least("points", "max_batch", max_batch, 1)
    require_at_least("points", "max_seq_len", max_seq_len, 1)
    inputs = _Inputs(dtype_names(dtypes), max_batch, max_seq_len)
    degrees = tuple(tp_sizes) if tp_sizes is not None else tables.DEFAULT_DEGREES
    tp_degrees(sizes=degrees)  # for its errors
    if specs is not None:
        _require_strategy("points", "specs", specs)
        if options:
            raise TPCheckError(
                f"points: specs is given, so {', '.join(sorted(options))} should be left out"
            )
        return _given_points(specs, degrees, legal, inputs)
    if max_seq_len > MAX_POSITIONS:
        options.setdefault("max_position_embeddings", max_seq_len)
    sources = _feasible(sorted(set(degrees)), legal, options, drop=tp_sizes is None)
    return _points(sources, inputs)


def _feasible(
    degrees: list[int], legal: bool | None, options: dict[str, Any], *, drop: bool
) -> _Sources:
    """Return specs by degree. A degree at which none can be is left out only if nobody asked."""
    sources = []
    for size in degrees:
        try:
            sources.append((size, model_specs(size, legal, **options)))
        except PlanError:
            if not drop or (size == degrees[-1] and not sources):
                raise
    return tuple(sources)


def _require_strategy(where: str, name: str, value: object) -> None:
    if not isinstance(value, st.SearchStrategy):
        raise TPCheckError(f"{where}: {name}={value!r}, but should be a Hypothesis strategy")


@dataclass(frozen=True, slots=True)
class _Inputs:
    dtypes: st.SearchStrategy[str]
    max_batch: int
    max_seq_len: int

    def draw(self, draw: st.DrawFn, spec: ModelSpec, tp_size: int) -> Point:
        """Draw the rest of a point, the seed last (models: [Draw Order])."""
        longest = min(self.max_seq_len, spec.max_position_embeddings)
        return Point(
            spec=spec,
            tp_size=tp_size,
            dtype=draw(self.dtypes),
            batch=draw(st.integers(1, self.max_batch)),
            seq_len=draw(token_counts(tp_size, longest)),
            seed=draw(st.integers(0, LARGEST_SEED)),
        )


@st.composite
def _points(draw: st.DrawFn, sources: _Sources, inputs: _Inputs) -> Point:
    tp_size, specs = draw(st.sampled_from(sources))
    return inputs.draw(draw, draw(specs), tp_size)


@st.composite
def _given_points(
    draw: st.DrawFn,
    specs: st.SearchStrategy[Any],
    degrees: tuple[int, ...],
    legal: bool | None,
    inputs: _Inputs,
) -> Point:
    spec = as_spec(draw(specs))
    within = legal_tp_sizes(spec, max(degrees))
    fits = [size for size in degrees if legal is None or (size in within) == legal]
    hypothesis.assume(fits)
    return inputs.draw(draw, spec, draw(st.sampled_from(sorted(set(fits)))))
