"""How float inputs are filled: kinds that do not hide bugs, and the tensors made of them.

Requirement: same-sign partials hide a non-linear step on a partial sum, moderate values hide an
overflow and a saturating scale, and distinct values hide a wrong tie-break. So each has a kind, a
tensor follows from (kind, shape, seed) alone, and torch is loaded only when one is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from tpcheck.errors import TPCheckError
from tpcheck.strategies.shapes import DTYPES

if TYPE_CHECKING:
    import torch

KINDS = ("normal", "cancelling", "coherent", "massive", "tiny", "ties", "integers")


def input_values(kinds: Sequence[str] = ()) -> st.SearchStrategy[str]:
    """Draw the name of a kind of values, for `fill`: "normal" first.

    Args:
        kinds: the kinds to draw from; all by default.

    Raises:
        TPCheckError: a kind is unknown.

    Example:
        >>> from hypothesis import find
        >>> from tpcheck.strategies import input_values
        >>> find(input_values(), lambda values: values.startswith("m"))
        'massive'
    """
    for kind in kinds:
        _require_kind("input_values", kind)
    return st.sampled_from(tuple(kinds) or KINDS)


def fill(
    values: str,
    shape: Sequence[int],
    seed: int,
    *,
    dtype: str = "float32",
    tp_size: int = 1,
    dim: int = -1,
) -> torch.Tensor:
    """Return a tensor of one kind of values: the same for the same arguments, on CPU.

    "normal"; "cancelling" and "coherent" follow rank by rank: the `tp_size` equal pieces along
    `dim` are one piece times factors that add up to nearly zero, or are all one. Stacked partials
    (dim=0) cancel so; so does a row-parallel product of cancelling inputs and coherent weights.
    "massive": normal with one index of `dim` in sixteen up to 3e5; "tiny": magnitudes below 2e-3;
    "ties": three different values only; "integers": from -2 to 2, so that a product of up to 64
    terms is exact in every dtype and any order.

    Args:
        dtype: bfloat16, float16, float32 or float64; magnitudes end at a quarter of its largest.

    Raises:
        TPCheckError: the kind or dtype is unknown.

    Example:
        >>> from tpcheck.strategies import fill
        >>> fill("integers", (2, 3), seed=0).tolist() == fill("integers", (2, 3), seed=0).tolist()
        True
        >>> bool(fill("cancelling", (4, 8), 0, tp_size=4, dim=0).sum(0).abs().max() < 0.5)
        True
    """
    import torch

    from tpcheck.strategies.fills import FILLS

    _require_kind("fill", values)
    if dtype not in (*DTYPES, "float64"):
        raise TPCheckError(f"fill: dtype={dtype!r}, but should be one of {', '.join(DTYPES)}")
    if not -len(shape) <= dim < len(shape):
        raise TPCheckError(f"fill: dim={dim}, but should be a dim of shape={tuple(shape)}")
    generator = torch.Generator().manual_seed(seed)
    rest = list(shape)
    rest.append(rest.pop(dim))
    made = FILLS[values](tuple(rest), generator, tp_size).movedim(-1, dim)
    deployed: torch.dtype = getattr(torch, dtype)
    largest = torch.finfo(deployed).max / 4
    return made.clamp(-largest, largest).to(deployed).contiguous()


def _require_kind(where: str, kind: str) -> None:
    if kind not in KINDS:
        raise TPCheckError(f"{where}: {kind!r}, but should be one of {', '.join(KINDS)}")
