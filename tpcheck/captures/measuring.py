"""Numbers about one tensor of two captures, block by block.

Requirement: memory does not grow with the tensors, positions stay exact (a block knows which
elements of the logical tensor it holds), and every number of `compare` is that of the whole tensor.
Blocks with equal bits, the common case, are only counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from tpcheck.captures.layouts import Layout, Shape, Span
from tpcheck.captures.tensors import Tensor, bits_of
from tpcheck.captures.tolerances import Limit
from tpcheck.comparison import as_float64, compare, mask_difference, relative
from tpcheck.numerics.ulp import ulps_of
from tpcheck.records import Comparison

BLOCK = 1 << 18
"""Elements held at once, per tensor: 2 MiB in float64."""


class Block(NamedTuple):
    """`rows` runs of `length` elements; where they begin in both flat tensors, and the strides."""

    span: Span
    rows: int
    length: int
    expected: int
    expected_stride: int
    local: int
    local_stride: int


class Worst(NamedTuple):
    """The element furthest off: NaN or Inf on one side only, else the largest error."""

    flat: int
    error: float
    actual: float
    expected: float
    ulp: float


@dataclass(frozen=True, slots=True)
class Measure:
    """A `Comparison` of the whole tensor and what it does not hold.

    `elements` counts all, `comparison.count` the finite ones, `differing` those with other bits.
    `required_rtol` (alone) is None where none is enough; `max_ulp` is the most ulp of the expected
    value that any element is off. `low` and `high` bound the elements beyond the limit, both
    inclusive; empty where there are none.
    """

    comparison: Comparison
    elements: int
    differing: int
    max_ulp: float
    required_rtol: float | None
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def region(self) -> str:
        """The smallest box round what is beyond the limit: `[0, 5, 32:64]`."""
        pairs = zip(self.low, self.high, strict=True)
        parts = (str(a) if a == b else f"{a}:{b + 1}" for a, b in pairs)
        return f"[{', '.join(parts)}]" if self.comparison.mismatches else ""


@dataclass(slots=True)
class Tally:
    """Adds up what blocks of one tensor come to. `shape` is the logical tensor's."""

    shape: Shape
    limit: Limit
    dtype: str
    elements: int = 0
    count: int = 0
    mismatches: int = 0
    masks: int = 0
    differing: int = 0
    square_error: float = 0.0
    square_expected: float = 0.0
    required_atol: float = 0.0
    max_ulp: float = 0.0
    max_rtol: float = 0.0
    weight: float = 0.0
    worst: Worst | None = None
    low: list[int] = field(default_factory=list)
    high: list[int] = field(default_factory=list)

    def add(
        self,
        actual: torch.Tensor,
        expected: torch.Tensor,
        start: int,
        stride: int,
        allowed: torch.Tensor | None = None,
    ) -> None:
        """Add a block [rows, length] whose row i begins at element start + i * stride.

        `allowed`: what each element may be off, in place of the limit.
        """
        self.elements += expected.numel()
        same = actual.dtype == expected.dtype
        if same and torch.equal(bits_of(actual), bits_of(expected)):
            self._add_equal(expected)
            return
        found = compare(actual, expected, dtype=self.dtype)
        width = 2 if actual.is_complex() or expected.is_complex() else 1
        got, want = (as_float64(x).reshape(x.shape[0], -1) for x in (actual, expected))
        masks = mask_difference(got, want)
        finite = got.isfinite() & want.isfinite()
        error = torch.where(finite, (got - want).abs(), 0.0)
        size = torch.where(finite, want.abs(), 0.0)
        differs = (bits_of(actual) != bits_of(expected)).reshape(got.shape) if same else error > 0
        ulps = ulps_of(size, self.dtype)
        limit = self.limit
        slack = (limit.rtol or 0.0) * size + (limit.max_ulp or 0.0) * ulps
        if allowed is not None:
            bad = (error > allowed) | masks
        elif limit.bits:
            bad = differs | masks
        else:
            # subtracted as in `compare`: what is required is then what passes, to the last bit
            bad = masks | ((error - slack > (limit.atol or 0.0)) & limit.elementwise)
        any_bad = bool(bad.any())
        self.count += found.count
        self.masks += int(masks.sum())
        self.mismatches += int(bad.sum())
        self.differing += int((differs | masks).sum())
        self.square_error += found.rms_error**2 * found.count
        self.square_expected += found.rms_expected**2 * found.count
        self.required_atol = max(self.required_atol, float((error - slack).max()))
        self.max_ulp = max(self.max_ulp, float((error / ulps).max()))
        off = error > 0
        if bool(off.any()):
            self.max_rtol = max(self.max_rtol, float((error[off] / size[off]).max()))
        at = _worst_of(error, masks, bad if any_bad else differs | masks)
        row, column = divmod(at, got.shape[1])
        worst = Worst(
            start + row * stride + column // width,
            float(error.flatten()[at]),
            _plain(actual, at),
            _plain(expected, at),
            float((error / ulps).flatten()[at]),
        )
        weight = math.inf if bool(masks.flatten()[at]) else worst.error
        if self.worst is None or weight > self.weight:
            self.weight, self.worst = weight, worst
        if any_bad:
            rows, columns = bad.nonzero().T
            self._widen(start + rows * stride + columns // width)

    def _add_equal(self, expected: torch.Tensor) -> None:
        want = as_float64(expected)
        finite = want.isfinite()
        self.count += int(finite.sum())
        self.square_expected += float(torch.where(finite, want, 0.0).square().sum())

    def freeze(self) -> Measure:
        """Return the numbers of everything added."""
        rms_error = math.sqrt(self.square_error / self.count) if self.count else 0.0
        rms_expected = math.sqrt(self.square_expected / self.count) if self.count else 0.0
        worst = self.worst or Worst(0, 0.0, 0.0, 0.0, 0.0)
        comparison = Comparison(
            count=self.count,
            mismatches=self.mismatches,
            mask_mismatches=self.masks,
            rms_error=rms_error,
            rms_expected=rms_expected,
            relative_rms=relative(rms_error, rms_expected),
            worst_error=worst.error,
            worst_actual=worst.actual,
            worst_expected=worst.expected,
            worst_ulp=worst.ulp,
            index=unravel(worst.flat, self.shape) if self.worst else (),
            required_atol=max(0.0, self.required_atol),
        )
        rtol = None if math.isinf(self.max_rtol) else self.max_rtol
        return Measure(
            comparison,
            self.elements,
            self.differing,
            self.max_ulp,
            rtol,
            tuple(self.low),
            tuple(self.high),
        )

    def _widen(self, flat: torch.Tensor) -> None:
        lows, highs = [], []
        for size in reversed(self.shape):
            index = flat % size
            flat = flat // size
            lows.append(int(index.min()))
            highs.append(int(index.max()))
        lows, highs = lows[::-1], highs[::-1]
        self.low = [min(a, b) for a, b in zip(self.low, lows, strict=True)] if self.low else lows
        self.high = (
            [max(a, b) for a, b in zip(self.high, highs, strict=True)] if self.high else highs
        )


def merged(tallies: Iterable[Tally]) -> Tally:
    """Return one tally of everything that several hold of one tensor."""
    tallies = list(tallies)
    total = Tally(tallies[0].shape, tallies[0].limit, tallies[0].dtype)
    for one in tallies:
        for name in ("elements", "count", "mismatches", "masks", "differing", "square_error"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.square_expected += one.square_expected
        for name in ("required_atol", "max_ulp", "max_rtol"):
            setattr(total, name, max(getattr(total, name), getattr(one, name)))
        if one.worst and (total.worst is None or one.weight > total.weight):
            total.worst, total.weight = one.worst, one.weight
        if one.low:
            total.low = list(map(min, total.low, one.low)) if total.low else list(one.low)
            total.high = list(map(max, total.high, one.high)) if total.high else list(one.high)
    return total


def measure(
    expected: Tensor, locals_: Mapping[int, Tensor], layout: Layout, limit: Limit
) -> dict[int, Tally]:
    """Return every rank's own part of the tensor, held against the expected elements."""
    dtype = expected.dtype
    tallies = {rank: Tally(layout.shape, limit, dtype) for rank in layout.ranks}
    for block in blocks(layout):
        want = rows_of(expected, block.expected, block, block.expected_stride)
        got = rows_of(locals_[block.span.rank], block.local, block, block.local_stride)
        tallies[block.span.rank].add(got, want, block.expected, block.expected_stride)
    return tallies


def measure_sum(
    expected: Tensor, locals_: Mapping[int, Tensor], layout: Layout, limit: Limit
) -> Tally:
    """Return the sum of the ranks' terms, in float64, held against the expected tensor.

    Where the limit allows it, equal bits are replaced by the worst case of terms that were rounded
    once each and a total that was: (ranks + 1) u sum|term|. Where bits were asked for, they are
    those of the sum rounded once. Integers are summed as such.

    Source: gamma_n * sum|term|, Higham 2002, section 4.2.
    """
    tally = Tally(layout.shape, limit, expected.dtype)
    held = expected.read(0, min(1, layout.size)).dtype
    wide = torch.int64
    if held.is_floating_point or held.is_complex:
        wide = torch.complex128 if held.is_complex else torch.float64
    for start in range(0, layout.size, BLOCK):
        stop = min(start + BLOCK, layout.size)
        terms = [locals_[rank].read(start, stop).reshape(1, -1) for rank in layout.ranks]
        total = torch.stack([term.to(wide) for term in terms]).sum(0)
        want = expected.read(start, stop).reshape(1, -1)
        allowed = None
        if limit.partial_bound and wide != torch.int64:
            sizes = torch.stack([as_float64(term).abs() for term in terms]).sum(0)
            unit = torch.finfo(held).eps / 2
            allowed = ((len(terms) + 1) * unit * sizes).reshape(1, -1)
        as_bits = limit.bits and allowed is None
        pair = (total.to(held), want) if as_bits else (total, want.to(wide))
        tally.add(*pair, start, stop - start, allowed)
    return tally


def blocks(layout: Layout) -> Iterator[Block]:
    """Cut a layout into blocks of about BLOCK elements, in the order of the logical tensor."""
    row = layout.size * layout.inner
    widths = {rank: width * layout.inner for rank, width in layout.widths.items()}
    if layout.outer * row == 0:
        return
    batch = max(1, BLOCK // max(row, 1, *widths.values()))
    for first in range(0, layout.outer, batch):
        rows = min(batch, layout.outer - first)
        for span in layout.spans:
            at = first * row + span.whole * layout.inner
            local = first * widths[span.rank] + span.local * layout.inner
            length = span.length * layout.inner
            step = length if rows > 1 else BLOCK
            for begin in range(0, length, max(step, 1)):
                part = min(step, length - begin)
                yield Block(span, rows, part, at + begin, row, local + begin, widths[span.rank])


def rows_of(tensor: Tensor, start: int, block: Block, stride: int) -> torch.Tensor:
    """Read a block's rows out of one of its tensors: [rows, length]."""
    if block.rows == 1:
        return tensor.read(start, start + block.length).reshape(1, -1)
    flat = tensor.read(start, start + (block.rows - 1) * stride + block.length)
    return flat.as_strided((block.rows, block.length), (stride, 1)).contiguous()


def unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of an element by its flat position."""
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))


def _plain(values: torch.Tensor, at: int) -> float:
    flat = torch.view_as_real(values) if values.is_complex() else values
    value: float = flat.reshape(-1)[at].item()
    return value


def _worst_of(error: torch.Tensor, masks: torch.Tensor, bad: torch.Tensor) -> int:
    """Return the flat position of the worst element: masks first, then the largest error."""
    for found in (masks.flatten().int(), error.flatten(), bad.flatten().int()):
        if bool(found.any()):
            return int(found.argmax())
    return 0
