"""Orders of additions to draw, and the accumulators that show them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from tpcheck.numerics.order import Tree, in_order


@st.composite
def trees(draw: st.DrawFn, fewest: int = 2, most: int = 8, widest: int = 2) -> Tree:
    """Draw a tree over all of 2 to `most` ranks, by adding up to `widest` subtrees at a time."""
    world = draw(st.integers(fewest, most))
    nodes: list[Tree] = list(draw(st.permutations(range(world))))
    while len(nodes) > 1:
        count = draw(st.integers(2, min(widest, len(nodes))))
        nodes = draw(st.permutations(nodes))
        nodes = [*nodes[count:], in_order(nodes[:count])]
    return nodes[0]


def accumulators_of(dtype: torch.dtype) -> list[torch.dtype]:
    """Return the dtype itself, a rounding per hop, and every wider one that loses the leaf."""
    wider = [torch.float32, torch.float64]
    bits = torch.finfo(dtype).eps
    found = [dtype, *(one for one in wider if torch.finfo(one).eps < bits)]
    return [one for one in found if (dtype, one) != (torch.float16, torch.float64)]
