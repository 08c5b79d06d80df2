"""Whole decoders, and whole points of a search: spec, degree, dtype, batch, length and seed.

Requirement: every option of the reference decoder is drawn both ways, at every degree, on both
sides of the plan's rules, and what fails shrinks to something a person can read: degree 2, one
layer, the fewest heads, the narrowest widths, every option off, one token, seed 0.

[Quantized] Whether the plan accepts a quantized decoder depends on its sizes and on its scales. Its
widths are stretched to whole units of a drawn size, so that codes in words and groups fit as well
as single channels, and the quantization is settled by the plan (quantizations: [Settling]). Some
of those that it should refuse have sizes that divide, and scales that do not.

[Draw Order] What matters most to a reader is drawn first, because Hypothesis shrinks what was drawn
first hardest: the degree, then layers, sizes, options, and the seed last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
from hypothesis import strategies as st

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.spec import Case, ModelSpec, RopeScaling
from tpcheck.strategies import tables
from tpcheck.strategies.drawing import LARGEST_SEED, as_spec
from tpcheck.strategies.quantizations import drawn_from, settle
from tpcheck.strategies.shapes import (
    DTYPES,
    LEAST_HIDDEN,
    LayerShape,
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
    RopeScaling("yarn", 8.0, original_max_position_embeddings=32, beta_fast=4.0, truncate=False),
)
"""llama3 stretches wavelengths above 32 / 4: an original length of 8192 would stretch none here.
yarn keeps pairs of more than 4 turns in the original length; none makes its usual 32 in one of 32.
"""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYER_PATTERNS = ((), (), (_SLIDING, _FULL), (_FULL, _SLIDING), (_FULL, _FULL, _SLIDING))
"""Which layers have the window, repeated over all of them; () leaves it to every layer."""

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
    "layer_types": st.sampled_from(_LAYER_PATTERNS),
    "attention_sinks": st.booleans(),
    "swiglu_limit": st.sampled_from((0.0, 0.5, 7.0)),
    "swiglu_alpha": st.sampled_from((1.702, 1.0)),
    "rope_theta": st.sampled_from((10000.0, 500000.0, 100.0)),
    "rope_scaling": st.sampled_from(_SCALINGS),
}
_UNITS = (1, 8, 16, 4, 32, 8)
"""Widths of quantized decoders are multiples of one, where bounds allow."""

_WITHOUT_ROPE = {"rope_theta": 10000.0, "rope_scaling": None}
_WITHOUT_LIMIT = {"swiglu_limit": 0.0, "swiglu_alpha": 1.702}


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
    """Draw a decoder with any of its options: heads, norms, biases, positions, windows, sinks.

    Of three decoders one is quantized (models: [Quantized]); quantization=None leaves that out.

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
    quantized = "quantization" not in pins and draw(st.sampled_from((False, False, True)))
    unit = draw(st.sampled_from(_UNITS)) if "quantization" not in pins else 1
    sizes = _sizes_of(question, quantized)
    layer = draw_layer(draw, sizes, bounds.max_hidden, bounds.max_head_dim, even_head_dim=rope)
    if quantized and question.legal is not False:
        layer = _stretched(layer, unit, question, bounds)
    drawn |= layer._asdict()
    vocab = bounds.vocab
    field("vocab_size", vocab_sizes_for(question.tp_sizes, _MAX_VOCAB) if vocab is None else vocab)
    for name, strategy in _OPTIONS.items():
        field(name, strategy)
    if not rope:
        drawn |= _WITHOUT_ROPE
    if not (drawn["mlp"] == "gated" and drawn["hidden_act"] == "silu" and drawn["swiglu_limit"]):
        drawn |= _WITHOUT_LIMIT
    pattern = drawn["layer_types"] if drawn["sliding_window"] else ()
    drawn["layer_types"] = tuple(
        pattern[layer % len(pattern)]
        for layer in range(drawn["num_hidden_layers"] if pattern else 0)
    )
    quantization = None if "quantization" in pins else draw(drawn_from())
    spec = ModelSpec(**({"max_position_embeddings": MAX_POSITIONS} | drawn | pins))
    if not quantized or quantization is None:
        return spec
    if question.legal is not None:
        quantization = settle(quantization, spec, question.tp_sizes, question.legal)
    return replace(spec, quantization=quantization)


def _sizes_of(question: Question, quantized: bool) -> Question:
    """Return what the sizes should be: those of a decoder refused for its scales are legal."""
    fitting = replace(question, legal=True)
    return fitting if quantized and question.legal is False and tables.pairs(fitting) else question


def _stretched(layer: LayerShape, unit: int, question: Question, bounds: _Bounds) -> LayerShape:
    """Return a layer of wider heads and features, in whole units as far as bounds and pins allow.

    Whatever divided a width divides it still.
    """
    pinned = dict(question.pins)
    head_dim, width = layer.head_dim, layer.intermediate_size
    bound = max(width, question.max_intermediate)  # a pinned width may be beyond it
    while unit > bounds.max_head_dim or width * unit > bound:
        unit //= 2
    wider = -(-head_dim // unit) * unit
    if "head_dim" not in pinned and wider <= bounds.max_head_dim:
        head_dim = wider
    if "intermediate_size" not in pinned:
        width *= unit
    return layer._replace(head_dim=head_dim, intermediate_size=width)


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
