"""Evidence made by hand, for tests of checks and verdicts that need no ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tpcheck.evidence import Evidence
from tpcheck.outputs import digest
from tpcheck.trace import Collective, Trace

Outputs = Mapping[str, torch.Tensor]


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 normals that bfloat16 can hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().double()


def trace(rank: int = 0, outputs: Outputs | None = None, **fields: Any) -> Trace:
    """Return a trace whose digests are those of its outputs; above rank 0 it keeps only digests."""
    outputs = outputs or {}
    digests = {key: digest(tensor) for key, tensor in outputs.items()}
    fields = {"digests": digests, "collectives": {}} | fields
    return Trace(rank=rank, outputs=outputs if rank == 0 else {}, **fields)


def ranks(outputs: Outputs, size: int = 2, **fields: Any) -> list[Trace]:
    """Return one trace per rank that all returned the same."""
    return [trace(rank, outputs, **fields) for rank in range(size)]


def calls(*ops: str, shape: tuple[int, ...] = (2, 4)) -> tuple[Collective, ...]:
    return tuple(Collective(i, op, shape, "float64", "sum") for i, op in enumerate(ops))


def evidence(
    exact: torch.Tensor | None = None,
    oracle: torch.Tensor | None = None,
    deployed: torch.Tensor | None = None,
    base: torch.Tensor | None = None,
    *,
    dtype: str = "bfloat16",
    tp_size: int = 2,
    **fields: Any,
) -> Evidence:
    """Return the evidence of one input A: clean wherever a tensor is not given.

    Clean deployed tensors are off by about one rounding, TP=N not more than TP=1.
    """
    oracle = values(4, 64) if oracle is None else oracle
    narrow = getattr(torch, dtype)
    exact = oracle if exact is None else exact
    base = rounded(oracle, narrow, 1) if base is None else base
    deployed = rounded(oracle, narrow, 2) if deployed is None else deployed
    given = Evidence(
        dtype=dtype,
        tp_size=tp_size,
        base=trace(0, {"A": base}),
        deployed=ranks({"A": deployed}, tp_size),
        oracle=trace(0, {"A": oracle}),
        exact=ranks({"A": exact}, tp_size),
        expected_source="a ring",
    )
    return replace(given, **fields)


def rounded(oracle: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return `oracle` with one random error of half an eps, in `dtype`."""
    noise = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(seed)).double()
    return (oracle * (1 + torch.finfo(dtype).eps / 2 * noise)).to(dtype)


def without_oracle(**fields: Any) -> Evidence:
    """Return clean evidence of a subject that cannot run in float64."""
    return replace(evidence(**fields), oracle=None, exact=(), oracle_dtype=fields.get("dtype", ""))


def failed(checks: Mapping[str, Any]) -> set[str]:
    return {name for name, check in checks.items() if check.outcome == "FAIL"}


def at(traces: Sequence[Trace], rank: int, **fields: Any) -> list[Trace]:
    """Return the traces with fields of one rank's replaced."""
    return [replace(t, **fields) if t.rank == rank else t for t in traces]
