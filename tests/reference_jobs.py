"""What the reference decoder's tests run on every rank; jobs go by dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpcheck.groups.jobs import Job, World
from tpcheck.groups.simulated import SimulatedRanks
from tpcheck.reference.checkpoint import load_decoder
from tpcheck.reference.decoder import Decoder, build_decoder
from tpcheck.reference.layout import cut, logical_tensors
from tpcheck.shard_plan import STRICT, SplitPolicy
from tpcheck.shard_plan.quant import quantized
from tpcheck.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Run:
    """One build and forward; `model` is a spec or a model directory."""

    model: ModelSpec | Path
    ids: torch.Tensor
    dtype: torch.dtype = torch.float64
    weight_dtype: torch.dtype = torch.bfloat16
    poison: bool = False
    poison_with: float = float("nan")
    policy: SplitPolicy = STRICT


@dataclass(frozen=True, slots=True)
class Reply:
    """What one rank has to show."""

    logits: torch.Tensor
    shards: dict[str, Any]
    collectives: list[str]
    decoded: torch.Tensor
    points: dict[str, tuple[torch.Tensor, torch.Tensor, Any, Any]]


def on_ranks(run: Run, size: int) -> tuple[Reply, ...]:
    """Run on simulated ranks and return every rank's reply; a failure is raised."""
    (result,) = SimulatedRanks().run([Job("tests.reference_jobs:rank_job", run, size)])
    if result.failure is not None:
        raise result.failure.exception or RuntimeError(result.failure.message)
    return result.replies


def ids_for(spec: ModelSpec, length: int = 7) -> torch.Tensor:
    """Return two rows of token ids, the same every time."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, spec.vocab_size, (2, length), generator=generator)


def alone(specs: Mapping[str, ModelSpec]) -> dict[str, Reply]:
    """Return what each spec replies at TP=1, by its name."""
    return {name: on_ranks(Run(spec, ids_for(spec)), 1)[0] for name, spec in specs.items()}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the RMS of the difference over the RMS of what is expected."""
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def rank_job(world: World, run: Run) -> Reply:
    """Build the decoder and collect what the tests look at."""
    tp: Any = world.group(seed=3, dtype=run.dtype, weight_dtype=run.weight_dtype)
    by_spec = isinstance(run.model, ModelSpec)
    decoder = (
        build_decoder(run.model, tp, policy=run.policy) if by_spec else load_decoder(run.model, tp)
    )
    if run.poison:
        poison_pads(decoder, run.poison_with)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor, Any, Any]] = {}
    handles = []
    for fqn, (module, before, after) in decoder.trace_points.items():

        def note(
            _: Any, args: Any, out: Any, fqn: str = fqn, b: Any = before, a: Any = after
        ) -> None:
            seen[fqn] = (args[0], out, b, a)

        handles.append(module.register_forward_hook(note))
    tp.recorder.take()
    logits = decoder(run.ids)
    collectives = [call.op for call in tp.recorder.take()]
    for handle in handles:
        handle.remove()
    return Reply(logits, decoder.shards(), collectives, decode(decoder, run.ids), seen)


def logits_job(world: World, run: Run) -> torch.Tensor:
    """Build the decoder of a spec and return its logits, nothing else: for runs by the thousand."""
    tp: Any = world.group(seed=3, dtype=run.dtype, weight_dtype=run.weight_dtype)
    decoder = build_decoder(run.model, tp, policy=run.policy)
    if run.poison:
        poison_pads(decoder, run.poison_with)
    return decoder(run.ids)


def poison_pads(decoder: Decoder, poison: float) -> int:
    """Fill every pad of every weight, and return how many elements that were."""
    poisoned = 0
    shards = decoder.shards()
    for name, tensor in logical_tensors(decoder.spec).items():
        part = cut(decoder.spec, decoder.plan, decoder.embed_tokens.tp.rank, tensor)
        stored = quantized(decoder.spec, name, tensor)
        local = dequantized(decoder, name) if stored else shards[name][0]
        pads = local.narrow(part.dim, part.real, part.pads)
        poisoned += pads.fill_(poison).numel()
    return poisoned


def dequantized(decoder: Decoder, name: str) -> torch.Tensor:
    """Return what a decoder computes with where a weight is quantized: its shards are the codes."""
    path, _, last = name.removeprefix("model.").removesuffix(".weight").rpartition(".")
    parent = decoder.get_submodule(path)
    module = getattr(parent, last, parent)  # an expert holds its down_proj itself
    named = dict(module.named_parameters(recurse=False))
    return next(named[key].data for key in ("weight_fD", "weight_Df", "down_Df") if key in named)


def unmoved_weights(decoder: Decoder, ids: torch.Tensor) -> list[str]:
    """Return the weights that may change by a quarter without moving a logit."""
    before = decoder(ids)
    unmoved = []
    for weight, parameter in decoder.named_parameters():
        value = parameter.data.clone()
        parameter.data = value * 1.25
        if relative_rms(decoder(ids), before) < 1e-9:
            unmoved.append(weight)
        parameter.data = value
    return unmoved


def decode(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of every position, the first two prefilled, the others one by one."""
    logits, state = decoder.prefill(ids[:, :2])
    parts = [logits]
    for position in range(2, ids.shape[1]):
        before = [(keys.clone(), values.clone()) for keys, values in state]
        logits, after = decoder.step(ids[:, position : position + 1], state)
        for (keys, values), (old_keys, old_values) in zip(state, before, strict=True):
            assert torch.equal(keys, old_keys), "step changed the state that it was given"
            assert torch.equal(values, old_values), "step changed the state that it was given"
        state = after
        parts.append(logits)
    return torch.cat(parts, dim=1)
