"""What ranks hold of one tensor, read as the tensor that TP=1 holds.

Requirement: code that declares no placement is judged all the same, and by no guess that a right
subject fails.

[Undeclared Placements] A tensor without a declared placement is read as Replicate when all ranks
hold the same bits or the reference's values, else as Shard(dim) when the sizes add up, else as
Partial("sum"). Two dims that fit equally well are a tie, and nothing is read. An even cut whose
last pieces are pads counts as one whose sizes add up, and what such pieces gather as TP=1's shape.

[Fused Layers] A layer that fuses several, [q | k | v], is cut part by part: rank r gives q_r, k_r,
v_r, and what the ranks give, end to end, is no Shard of what TP=1 gives. Where each rank's channels
are runs of the reference's in its order, and each goes on where that of the rank before ends, it is
read so.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from tpcheck.comparison import as_float64, pooled_rms, relative
from tpcheck.placement import Partial, Placement, Replicate, Shard, Slices

_MOST_PARTS = 8
"""Of a fused layer. An input projection of Mamba 2 has five, of a gated delta net six."""

_MOST_MOVED = 64
"""Slices that a layer gives in another order: as many as it has heads, at worst."""

Run = tuple[int, int]
"""The channels [start, stop) of the reference that a rank's next channels are."""


def infer(
    outputs: Sequence[torch.Tensor], want: torch.Tensor, allowed: float
) -> Sequence[Placement] | None:
    """Return the placement that each rank's tensor is read with, or None.

    Args:
        outputs: of one module, rank by rank.
        want: what TP=1 has there.
        allowed: relative rms up to which two tensors count as the same.
    """
    size = len(outputs)
    if all(unpadded(output, want, size).shape == want.shape for output in outputs):
        outputs = [unpadded(output, want, size) for output in outputs]
    if all(output.shape == want.shape for output in outputs):
        right = [relative_rms(output, want) <= allowed for output in outputs]
        same = all(right) or all(torch.equal(output, outputs[0]) for output in outputs)
        if not same and relative_rms(_sum(outputs), want) <= allowed:
            return [Partial()] * size
        if right == [True] + [False] * (size - 1) and size > 2 and 1 in want.shape:
            return None  # one token, perhaps, and pads on the other ranks
        return [Replicate() if same or any(right) else Partial()] * size
    if any(output.ndim != want.ndim for output in outputs):
        return None
    cut = [
        dim
        for dim in range(want.ndim)
        if all(
            output.shape[:dim] + output.shape[dim + 1 :] == want.shape[:dim] + want.shape[dim + 1 :]
            for output in outputs
        )
    ]
    dims = [dim for dim in cut if sum(out.shape[dim] for out in outputs) == want.shape[dim]]
    if not dims and len(cut) == 1:
        return _padded(outputs, want, cut[0])
    if len(dims) != 1:
        return None
    if relative_rms(torch.cat(list(outputs), dims[0]), want) > allowed:
        fused = _fused(outputs, want, dims[0], allowed)
        if fused is not None:
            return fused
    return [Shard(dims[0])] * size


def _padded(
    outputs: Sequence[torch.Tensor], want: torch.Tensor, dim: int
) -> Sequence[Placement] | None:
    """Return an even cut of what was padded at its end, as tokens are for sequence parallel."""
    total = want.shape[dim]
    share = -(-total // len(outputs))
    if any(output.shape[dim] != share for output in outputs):
        return None
    edges = [min(rank * share, total) for rank in range(len(outputs) + 1)]
    spans = itertools.pairwise(edges)
    return [Slices(_pieces([span], dim, want.ndim)) for span in spans]


def without_pads(
    outputs: Sequence[torch.Tensor], placements: Sequence[Placement], want: torch.Tensor
) -> tuple[Sequence[torch.Tensor], Sequence[Placement]]:
    """Return what ranks hold and where it belongs, without the pads that make a cut even.

    What a sequence-parallel model gathers, or adds up and deals out, has pads after its last token.
    """
    kind = placements[0]
    if isinstance(kind, (Replicate, Partial)):
        return [unpadded(output, want, len(outputs)) for output in outputs], placements
    if isinstance(kind, Shard) and all(output.ndim == want.ndim for output in outputs):
        dim = kind.dim % want.ndim
        if sum(output.shape[dim] for output in outputs) != want.shape[dim]:
            return outputs, _padded(outputs, want, dim) or placements
    return outputs, placements


def unpadded(x: torch.Tensor, like: torch.Tensor, size: int) -> torch.Tensor:
    """Return x without the pads that one dim has at its end for its cut in `size` to be even."""
    if x.ndim != like.ndim:
        return x
    longer = [dim for dim in range(x.ndim) if x.shape[dim] != like.shape[dim]]
    if len(longer) != 1:
        return x
    total = like.shape[longer[0]]
    even = -(-total // size) * size
    return x.narrow(longer[0], 0, total) if x.shape[longer[0]] == even else x


def _sum(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([widened(output) for output in outputs]).sum(0)


def _fused(
    outputs: Sequence[torch.Tensor], want: torch.Tensor, dim: int, allowed: float
) -> Sequence[Placement] | None:
    """Return the pieces of a fused layer's parts; see [Fused Layers]."""
    ranks: Sequence[Sequence[Run]] = [_runs(output, want, dim, allowed) for output in outputs]
    if not _in_rank_order(ranks):
        ranks = _as_most_ranks(ranks, want.shape[dim])
    return [Slices(_pieces(runs, dim, want.ndim)) for runs in ranks] or None


def _in_rank_order(ranks: Sequence[Sequence[Run]]) -> bool:
    parts = len(ranks[0])
    if parts < 2 or any(len(runs) != parts for runs in ranks):
        return False
    if list(ranks[0]) != sorted(ranks[0]):  # TP=1 has the parts in another order
        return False
    return all(
        here[1] == there[0]
        for part in range(parts)
        for here, there in itertools.pairwise(runs[part] for runs in ranks)
    )


def _as_most_ranks(ranks: Sequence[Sequence[Run]], channels: int) -> Sequence[Sequence[Run]]:
    """Return every rank's runs as most ranks' even cut has them, so that the odd rank is told."""
    lengths = [tuple(stop - start for start, stop in runs) for runs in ranks]
    usual, _ = Counter(lengths).most_common(1)[0]
    if len(usual) < 2 or sum(usual) * len(ranks) != channels:
        return []
    begins = [len(ranks) * sum(usual[:part]) for part in range(len(usual))]
    even = [
        [
            (begin + rank * length, begin + (rank + 1) * length)
            for begin, length in zip(begins, usual, strict=True)
        ]
        for rank in range(len(ranks))
    ]
    fit = sum(list(runs) == wanted for runs, wanted in zip(ranks, even, strict=True))
    return even if 2 * fit > len(ranks) else []


def _pieces(
    runs: Sequence[Run], dim: int, ndim: int
) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    pieces = []
    at = 0
    for start, stop in runs:
        here, there = [slice(None)] * ndim, [slice(None)] * ndim
        here[dim], there[dim] = slice(at, at + stop - start), slice(start, stop)
        pieces.append((tuple(here), tuple(there)))
        at += stop - start
    return pieces


def displaced(
    outputs: Sequence[torch.Tensor],
    placements: Sequence[Placement],
    want: torch.Tensor,
    allowed: float,
) -> str:
    """Say which of the reference's slices the ranks hold in place of their own, if it is that."""
    kind = placements[0]
    if isinstance(kind, Shard):
        moved = []
        for rank, [(output, own)] in enumerate(_held_and_wanted(outputs, placements, want)):
            if relative_rms(output, own) <= _close(allowed):  # a channel of zeros is any of them
                continue
            held = _runs(output, want, kind.dim, allowed, _MOST_MOVED)
            moved += [f"rank {rank} holds {_spans(held)}"] if held else []
        if moved:
            more = ", ..." if len(moved) > 3 else ""
            return f"of TP=1's dim {kind.dim}, {', '.join(moved[:3])}{more}"
    if isinstance(kind, Replicate):
        odd = next(output for output in outputs if relative_rms(output, want) > allowed)
        for dim in reversed(range(want.ndim)):
            held = _runs(odd, want, dim, allowed, _MOST_MOVED)
            if held and relative_rms(odd, want) > _close(allowed):
                return f"it is made of {_spans(held)} of TP=1's dim {dim}"
    return ""


def _spans(runs: Sequence[Run]) -> str:
    said = [f"{start}:{stop}" for start, stop in runs[:3]] + ["..."] * (len(runs) > 3)
    return " + ".join(said)


def _close(allowed: float) -> float:
    """Return how far off a channel is the same one: another is off by more than either of them."""
    return min(10 * allowed, 0.5)


def _runs(
    output: torch.Tensor, want: torch.Tensor, dim: int, allowed: float, most: int = _MOST_PARTS
) -> Sequence[Run]:
    """Return which of the reference's channels a rank's are; none if they are no few runs."""
    own_cN = as_float64(output.movedim(dim, 0)).flatten(1)
    all_CN = as_float64(want.movedim(dim, 0)).flatten(1)
    close = _close(allowed) * rms(all_CN)
    runs: list[Run] = []
    done = 0
    while done < len(own_cN):
        if len(runs) == most:
            return []
        start = int((all_CN - own_cN[done]).square().mean(1).argmin())
        length = min(len(own_cN) - done, len(all_CN) - start)
        error = own_cN[done : done + length] - all_CN[start : start + length]
        off = (error.square().mean(1).sqrt() > close).nonzero()
        length = int(off[0]) if len(off) else length
        if length == 0:
            return []
        runs.append((start, start + length))
        done += length
    return runs


def reconciled(
    outputs: Sequence[torch.Tensor],
    placements: Sequence[Placement],
    want: torch.Tensor,
    allowed: float,
) -> tuple[int | None, torch.Tensor | None]:
    """Return (the rank to blame, if one can be told; the logical tensor as the ranks hold it)."""
    kind = placements[0]
    if isinstance(kind, Replicate):
        off = [r for r, out in enumerate(outputs) if relative_rms(out, want) > allowed]
        only = off[0] if off and len(off) < len(outputs) else None
        return only, outputs[off[0] if off else 0]
    if isinstance(kind, Partial):
        if any(output.shape != want.shape for output in outputs):
            return None, None
        total = _sum(outputs)
        if relative_rms(total, want) <= allowed:
            return None, total
        off = [r for r, out in enumerate(outputs) if relative_rms(out, want) > allowed]
        if 0 < len(off) < len(outputs):  # copies after all, and some are right
            return off[0], outputs[off[0]]
        return None, total
    if isinstance(kind, Shard):
        try:
            whole = torch.cat(list(outputs), kind.dim)
        except RuntimeError:
            return None, None
    else:
        whole = torch.zeros_like(want)
        for output, placement in zip(outputs, placements, strict=True):
            assert isinstance(placement, Slices)
            for here, there in placement.pieces:
                whole[there] = output[here]
    if whole.shape != want.shape:
        return None, whole
    pairs = _held_and_wanted(outputs, placements, want)
    off = [
        rank
        for rank, pieces in enumerate(pairs)
        if any(relative_rms(got, ref) > allowed for got, ref in pieces)
    ]
    return (off[0] if off and len(off) < len(outputs) else None), whole


def _held_and_wanted(
    outputs: Sequence[torch.Tensor], placements: Sequence[Placement], want: torch.Tensor
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield each rank's pieces beside those of the reference."""
    kind = placements[0]
    if isinstance(kind, Shard):
        sizes = [output.shape[kind.dim] for output in outputs]
        for output, piece in zip(outputs, want.split(sizes, kind.dim), strict=True):
            yield [(output, piece)]
        return
    for output, placement in zip(outputs, placements, strict=True):
        assert isinstance(placement, Slices)
        yield [(output[here], want[there]) for here, there in placement.pieces]


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64, or in complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def rms(x: torch.Tensor) -> float:
    return float(as_float64(x).square().mean().sqrt()) if x.numel() else 0.0


def relative_rms(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    """Relative rms over finite elements; infinite when shapes or masks differ."""
    if got is None or want is None or got.shape != want.shape:
        return float("inf")
    a, b = as_float64(got), as_float64(want)
    if bool((a.isfinite() != b.isfinite()).any()):
        return float("inf")
    error, magnitude, _ = pooled_rms([(a, b)])
    return relative(error, magnitude)
