"""Hypothesis strategies for tensor parallelism: degrees, shapes, blocks, values, whole decoders.

Requirement: what a property needs is drawn on the side of the plan's rules that it asks for
(`legal=True`, False or None), is constructed and not filtered, and shrinks to something a person
can read. Importing this loads Hypothesis and no torch.

Example:
    >>> from hypothesis import given
    >>> from tpcheck.strategies import points
    >>> @given(points(tp_sizes=(2, 4), max_layers=1))
    ... def layers_are_legal(point):
    ...     assert point.spec.num_attention_heads % point.tp_size == 0
    >>> layers_are_legal()
"""

from __future__ import annotations

from tpcheck.strategies.drawing import as_spec, generated_cases
from tpcheck.strategies.models import Point, model_specs, points
from tpcheck.strategies.policies import split_policies
from tpcheck.strategies.quant import QuantBlock, quant_blocks, whole_blocks
from tpcheck.strategies.quantizations import quantizations
from tpcheck.strategies.shapes import (
    DTYPES,
    HeadCounts,
    LayerShape,
    MLPShape,
    dtypes,
    head_counts,
    layer_shapes,
    mlp_shapes,
    token_counts,
    tp_degrees,
    vocab_sizes,
)
from tpcheck.strategies.values import KINDS, fill, input_values

__all__ = [
    "DTYPES",
    "KINDS",
    "HeadCounts",
    "LayerShape",
    "MLPShape",
    "Point",
    "QuantBlock",
    "as_spec",
    "dtypes",
    "fill",
    "generated_cases",
    "head_counts",
    "input_values",
    "layer_shapes",
    "mlp_shapes",
    "model_specs",
    "points",
    "quant_blocks",
    "quantizations",
    "split_policies",
    "token_counts",
    "tp_degrees",
    "vocab_sizes",
    "whole_blocks",
]
