"""What each level buys on one subject, and what it costs: measured on the subject's own ranks.

Requirement: no level is sold by what it should do. Each is run on the same build and inputs as the
deployed model, and held against TP=1 and the float64 oracle; a level that this subject cannot have
says why instead.

[Pinned] A router's choices are those of the float64 oracle in every run, as in the drift check: a
flip moves a token by far more than rounding, and a remedy that happens to flip fewer would be sold
for it. How many each run would have flipped is counted beside the ratio. Without an oracle, and
where a run chooses among others than the oracle does, choices are its own, and `routing_pinned` is
False.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tpcheck.building import arguments, built, measured_on
from tpcheck.comparison import pooled_rms
from tpcheck.errors import SubjectError
from tpcheck.evidence import routing_flips
from tpcheck.execution import Task
from tpcheck.fallback.gathering import Cost, Meter
from tpcheck.fallback.levels import LEVELS, parallel_model, parse_levels
from tpcheck.groups.jobs import Job, JobFailed, Ranks, World
from tpcheck.numerics.drift import floored
from tpcheck.numerics.ulp import eps
from tpcheck.observation.dispatch import Choice, Watch
from tpcheck.outputs import digest, whole

REPEATS = 3
"""Timed forwards of each level, after one that is not: the median of the slowest rank counts."""


@dataclass(frozen=True, slots=True)
class Effect:
    """One level on one subject at one degree.

    ratio_before, ratio_after: rms error against float64 of TP=N and of the level, over TP=1's; None
    without an oracle. logprob_before, logprob_after: largest difference to TP=1 in the
    log-probability of a token; None for a subject without token ids. same_bits_as_tp1: of every
    input's output. bytes_gathered, peak_bytes (of whole weights held at once), device_peak_bytes
    (the allocator's, None on CPU): of one forward, the worst rank's. seconds, seconds_deployed: of
    one forward, the slowest rank's median; None on simulated ranks, which take turns in one thread.
    flips_before, flips_after: rows that TP=N and the level route otherwise than the oracle; None
    where nothing is routed. routing_pinned: whether every choice was the oracle's all the same.
    `measured_on`: where, times belong there. `reason`: why there are no numbers.
    """

    level: str
    does: str
    reason: str = ""
    ratio_before: float | None = None
    ratio_after: float | None = None
    logprob_before: float | None = None
    logprob_after: float | None = None
    same_bits_as_tp1: bool | None = None
    ranks_agree: bool | None = None
    bytes_gathered: int | None = None
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    seconds: float | None = None
    seconds_deployed: float | None = None
    flips_before: int | None = None
    flips_after: int | None = None
    routing_pinned: bool | None = None
    measured_on: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ran:
    """A level on one rank: outputs by input (rank 0 only), digests, what it took, or why not.

    choices: by input, what its routers chose before they were pinned; unpinned: how many of them
    could not be.
    """

    outputs: dict[str, torch.Tensor]
    digests: dict[str, str]
    cost: Cost
    device_peak: int | None = None
    device: str = "cpu"
    reason: str = ""
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    unpinned: int = 0


def fallback_effects(
    ranks: Ranks,
    task: Task,
    tp_size: int,
    levels: str | Sequence[str],
    *,
    oracle_dtype: str = "float64",
    token_ids: bool = True,
    max_bytes: int | None = None,
    timeout_s: float = 120.0,
) -> list[Effect]:
    """Return what levels buy and cost on a subject, in the order asked for.

    Args:
        task: the subject in its deployed dtype; its `inputs` are run, `order` is not looked at.
        oracle_dtype: of TP=1's wide run; "" where the subject has none.
        token_ids: whether the first argument of an input is token ids, so that it can be scored.
        max_bytes: most bytes of whole weights held at once.

    Raises:
        SubjectError: a level is unknown.
        JobFailed: a rank raised, died or hung.
    """
    names = parse_levels(levels)
    function = "tpcheck.fallback.measuring:run_levels"
    task, oracle = replace(task, watch=False, pinned={}), None
    if oracle_dtype:
        wide = replace(task, dtype=oracle_dtype, watch=True)
        ((first, *_),) = _replies(ranks, [Job(function, (wide, (), None), 1, timeout_s)])
        oracle = first[""]
        task = replace(task, pinned=oracle.choices)
    deployed = Job(function, (task, (), None), 1, timeout_s)
    split = Job(function, (task, names, max_bytes), tp_size, timeout_s)
    (single, *_), every = _replies(ranks, [deployed, split])
    alone = single[""]
    where = measured_on(ranks.label, alone.device)
    effects = [
        replace(effect(name, alone, every, oracle, task, token_ids=token_ids), measured_on=where)
        for name in names
    ]
    if ranks.label == "sim":
        return [replace(one, seconds=None, seconds_deployed=None) for one in effects]
    return effects


def _replies(ranks: Ranks, jobs: Sequence[Job]) -> list[Sequence[dict[str, Ran]]]:
    results = ranks.run(jobs)
    for result in results:
        if result.failure is not None:
            raise JobFailed(result.failure)
    return [result.replies for result in results]


def effect(
    name: str,
    alone: Ran,
    every: Sequence[dict[str, Ran]],
    oracle: Ran | None,
    task: Task,
    *,
    token_ids: bool,
) -> Effect:
    """Return one level's effect: of what TP=1, every rank at TP=N and the oracle gave."""
    does = LEVELS[name].does
    ran, before = every[0][name], every[0][""]
    if ran.reason:
        return Effect(name, does, ran.reason)
    ratios: tuple[float | None, float | None] = (None, None)
    if oracle is not None:
        own, magnitude = _distance(alone, oracle)
        at_1 = floored(own, magnitude, eps(task.dtype))
        if at_1:
            ratios = _distance(before, oracle)[0] / at_1, _distance(ran, oracle)[0] / at_1
    scores: tuple[float | None, float | None] = (None, None)
    if token_ids:
        scores = _score_difference(before, alone, task), _score_difference(ran, alone, task)
    costs = [reply[name] for reply in every]
    return Effect(
        name,
        does,
        **_routing(alone, every, name, oracle),
        ratio_before=ratios[0],
        ratio_after=ratios[1],
        logprob_before=scores[0],
        logprob_after=scores[1],
        same_bits_as_tp1=ran.digests == alone.digests,
        ranks_agree=all(one.digests == ran.digests for one in costs),
        bytes_gathered=max(one.cost.bytes_gathered for one in costs),
        peak_bytes=max(one.cost.peak_bytes for one in costs),
        device_peak_bytes=max((one.device_peak for one in costs if one.device_peak), default=None),
        seconds=max(one.cost.seconds for one in costs),
        seconds_deployed=max(reply[""].cost.seconds for reply in every),
    )


def _routing(
    alone: Ran, every: Sequence[dict[str, Ran]], name: str, oracle: Ran | None
) -> dict[str, Any]:
    if oracle is None or not oracle.choices:
        return {}
    unpinned = alone.unpinned + sum(r[""].unpinned + r[name].unpinned for r in every)
    before, after = (
        routing_flips(one.choices, oracle.choices)[0] for one in (every[0][""], every[0][name])
    )
    return {"flips_before": before, "flips_after": after, "routing_pinned": not unpinned}


def run_levels(world: World, work: tuple[Task, tuple[str, ...], int | None]) -> dict[str, Ran]:
    """Run the deployed model ("") and each level on this rank: the job of `fallback_effects`."""
    task, names, max_bytes = work
    with torch.no_grad():
        group, forward = built(world, task)
        inputs = {key: arguments(group, task, key) for key in task.inputs}

        def deployed(*given: torch.Tensor) -> Any:
            return whole(forward(*given))

        found = {"": _measured(deployed, inputs, group, Meter(), task)}
        for name in names:
            meter = Meter(max_bytes)
            try:
                level = LEVELS[name].make(parallel_model(forward, group), meter)
                found[name] = _measured(level, inputs, group, meter, task)
            except SubjectError as error:
                found[name] = Ran({}, {}, Cost(), reason=str(error))
    return found


def _measured(
    forward: Any, inputs: dict[str, list[torch.Tensor]], group: Any, meter: Meter, task: Task
) -> Ran:
    outputs, digests = {}, {}
    choices: dict[str, Sequence[Choice]] = {}
    unpinned = 0
    for key, given in inputs.items():
        watch = _watch(group, task, key)
        with watch or contextlib.nullcontext():
            output = forward(*(tensor.clone() for tensor in given)).detach()
        if watch is not None and watch.choices:
            choices[key] = watch.choices
            unpinned += watch.unpinned if task.pinned else 0
        digests[key] = digest(output)
        if group.rank == 0:
            outputs[key] = output.to("cpu")
    on_gpu = group.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(group.device)
    given = next(iter(inputs.values()))
    costs = []
    for _ in range(REPEATS):
        meter.start()
        started = time.perf_counter()
        forward(*given)
        if on_gpu:
            torch.cuda.synchronize(group.device)
        costs.append(replace(meter.cost(), seconds=time.perf_counter() - started))
    group.recorder.take()
    peak = int(torch.cuda.max_memory_allocated(group.device)) if on_gpu else None
    seconds = statistics.median(cost.seconds for cost in costs)
    cost = replace(costs[-1], seconds=seconds)
    return Ran(outputs, digests, cost, peak, group.device.type, "", choices, unpinned)


def _watch(group: Any, task: Task, key: str) -> Watch | None:
    """Return what sees a forward's choices, and pins them to the oracle's where there are any."""
    if not task.watch and not task.pinned:
        return None
    return Watch(group.recorder, pinned=task.pinned.get(key), rank=group.rank)


def _distance(one: Ran, other: Ran) -> tuple[float, float]:
    pairs = [(output, other.outputs[key]) for key, output in one.outputs.items()]
    error, magnitude, _ = pooled_rms(pairs)
    return error, magnitude


def _score_difference(one: Ran, other: Ran, task: Task) -> float | None:
    """Return the largest difference in the log-probability of an input's own next tokens."""
    worst = None
    for key, output in one.outputs.items():
        ids = task.inputs[key][0]
        if output.ndim != 3 or ids.ndim != 2 or ids.shape[1] < 2:
            continue
        mine, expected = (_next_logprobs(x, ids) for x in (output, other.outputs[key]))
        worst = max(worst or 0.0, float((mine - expected).abs().max()))
    return worst


def _next_logprobs(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    every = torch.log_softmax(logits_BTV[:, :-1].double(), -1)
    return every.gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
