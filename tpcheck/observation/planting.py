"""One fault, planted through the seam into a subject whose own code is not touched.

Requirement: what a PASS would have caught is asked of the user's subject, not of one of ours. So a
fault is a change of what tpcheck hands out (a weight) or of what one collective takes or returns,
at TP=N only. Code that calls torch.distributed itself is reached by own_calls.py.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tpcheck.groups.base import RecordedGroup
from tpcheck.observation.own_calls import OwnCalls
from tpcheck.trace import Collective

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Plant:
    """One fault. `site` is a weight's name, or a collective's position in the forward.

    rank: where it is planted; a `perturbed` weight is the same on every rank. dim: of a weight's
    `exchanged` and `zeroed`. exponent: k of `scaled` and `perturbed`, which change by 2^-k.
    """

    kind: str
    site: str | int
    rank: int = 0
    dim: int = 0
    exponent: int = 4

    def describe(self) -> str:
        """Say what was done, as it stands behind a site's name."""
        what = _WORDS[self.kind].format(line=("row", "column", "slice")[min(self.dim, 2)])
        if self.kind == "scaled":
            what += f" by 1+2^-{self.exponent}"
        everywhere = self.kind in ("perturbed", "skipped", "doubled", "swapped")
        return what if everywhere else f"{what} on rank {self.rank}"


SURVEY = Plant("nothing", -1)
"""Plants nothing: the run that shows where faults can be planted."""


@dataclass(frozen=True, slots=True)
class CollectiveSite:
    """A collective of the forward, as one rank made it. `magnitude`: its operand's sum of |x|.

    detail: the reduction's op, or `dim=` of a gather.
    """

    position: int
    op: str
    detail: str
    fqn: str
    floating: bool
    magnitude: float


@dataclass(frozen=True, slots=True)
class Survey:
    """What one rank offers to plant faults in: collectives in order, weights' shapes by name."""

    collectives: tuple[CollectiveSite, ...]
    weights: Mapping[str, tuple[int, ...]]


class Planter:
    """Plants one fault at a time in one rank's build, and notes the sites that pass by.

    A weight's fault is in the build that follows; a collective's in the forward under `planted`.
    """

    def __init__(self, group: RecordedGroup, plant: Plant) -> None:
        self._group = group
        self._plant = plant
        self._sites: list[CollectiveSite] = []
        self._weights: dict[str, tuple[int, ...]] = {}
        self._handed_out: torch.Tensor | None = None
        group.weights.perturb = self._weight

    @contextlib.contextmanager
    def planted(self, plant: Plant, *, real_ranks: bool) -> Iterator[None]:
        """Plant a collective's fault while this is open, and note the collectives that pass by."""
        self._plant, self._sites = plant, []
        self._group.interceptor = self._collective
        try:
            # Simulated ranks have no torch.distributed, and modes cost Python for every op.
            with OwnCalls(self._group, self._own_collective) if real_ranks else _nothing():
                yield
        finally:
            self._group.interceptor = None

    def survey(self) -> Survey:
        """Return the sites seen: the build's weights, the last forward's collectives."""
        return Survey(tuple(self._sites), dict(self._weights))

    def _weight(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor is self._handed_out:
            return tensor  # named_weights() of generated weights come by here twice
        if tensor.is_floating_point():
            self._weights[name] = tuple(tensor.shape)
        plant = self._plant
        if plant.site == name and (plant.kind == "perturbed" or plant.rank == self._group.rank):
            tensor = _WEIGHT_FAULTS[plant.kind](tensor, plant, self._group.size)
        self._handed_out = tensor
        return tensor

    def _own_collective(
        self, _peers: RecordedGroup, call: Collective, x: torch.Tensor, run: Run
    ) -> torch.Tensor:
        return self._collective(self._group, call, x, run)

    def _collective(
        self, group: RecordedGroup, call: Collective, x: torch.Tensor, run: Run
    ) -> torch.Tensor:
        plant, here = self._plant, len(self._sites)
        floating = x.is_floating_point()
        magnitude = float(x.detach().to(torch.float64).abs().sum()) if floating else 0.0
        site = CollectiveSite(here, call.op, call.detail, group.recorder.fqn, floating, magnitude)
        self._sites.append(site)
        if plant.site != here:
            return run(x)
        before, after = _OPERAND_FAULTS.get(plant.kind), _RESULT_FAULTS.get(plant.kind)
        result = run(before(x, plant) if before and plant.rank == group.rank else x)
        changed = after(x, result, site, group, plant) if after else result
        # A subgroup of the subject's own cuts otherwise than the whole world does.
        return changed if changed.shape == result.shape else result


_WORDS = {
    "perturbed": "perturbed",
    "exchanged": "two ranks' {line}s exchanged",
    "zeroed": "last {line} zeroed",
    "scaled": "scaled",
    "missing": "missing",
    "skipped": "skipped",
    "doubled": "reduced twice",
    "swapped": "two ranks' pieces swapped",
}


def _perturbed(tensor: torch.Tensor, plant: Plant, _size: int) -> torch.Tensor:
    """Move every element by 2^-k of itself, up or down: scaling all alike hides behind a norm."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(plant.site).encode()))
    signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)
    wide = tensor.to(torch.float64) * (1 + signs.to(tensor.device) * 2.0**-plant.exponent)
    return wide.to(tensor.dtype)


def _exchanged(tensor: torch.Tensor, plant: Plant, size: int) -> torch.Tensor:
    pieces = list(tensor.tensor_split(size, plant.dim))
    other = (plant.rank + 1) % size
    pieces[plant.rank], pieces[other] = pieces[other], pieces[plant.rank]
    return torch.cat(pieces, plant.dim)


def _zeroed(tensor: torch.Tensor, plant: Plant, size: int) -> torch.Tensor:
    """Zero the last row (or column) of the part that an even split gives this rank."""
    changed = tensor.clone()
    mine = changed.tensor_split(size, plant.dim)[plant.rank]
    if mine.shape[plant.dim]:
        mine.select(plant.dim, -1).zero_()
    return changed


_WEIGHT_FAULTS = {"perturbed": _perturbed, "exchanged": _exchanged, "zeroed": _zeroed}


def _scaled(x: torch.Tensor, plant: Plant) -> torch.Tensor:
    return (x.to(torch.float64) * (1 + 2.0**-plant.exponent)).to(x.dtype)


def _missing(x: torch.Tensor, _plant: Plant) -> torch.Tensor:
    return torch.zeros_like(x)


_OPERAND_FAULTS = {"scaled": _scaled, "missing": _missing}


def _skipped(
    x: torch.Tensor, _result: torch.Tensor, site: CollectiveSite, group: RecordedGroup, _: Plant
) -> torch.Tensor:
    """Return the operand as it was; of a reduce-scatter this rank's piece of it."""
    if site.op == "reduce_scatter":
        x = x.chunk(group.size, _dim(site))[group.rank]
    return x.clone()


def _doubled(
    _x: torch.Tensor, result: torch.Tensor, _site: CollectiveSite, group: RecordedGroup, _: Plant
) -> torch.Tensor:
    """Return what a second sum over the ranks makes of the first one's result."""
    return result * group.size


def _swapped(
    _x: torch.Tensor,
    result: torch.Tensor,
    site: CollectiveSite,
    group: RecordedGroup,
    plant: Plant,
) -> torch.Tensor:
    if result.shape[_dim(site)] % group.size:
        return result
    pieces = list(result.chunk(group.size, _dim(site)))
    other = (plant.rank + 1) % group.size
    pieces[plant.rank], pieces[other] = pieces[other], pieces[plant.rank]
    return torch.cat(pieces, _dim(site))


_RESULT_FAULTS = {"skipped": _skipped, "doubled": _doubled, "swapped": _swapped}


def _dim(site: CollectiveSite) -> int:
    return int(site.detail.removeprefix("dim=")) if site.detail.startswith("dim=") else 0


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield
