"""Make a golden record of one case in one dtype: TP=1 as `run` runs it, and what it is of.

Requirement: the same TP=1, oracle and inputs as a run would hold a degree to, so that a record says
what a run on this machine said. Inputs are those of fixed degrees, because a record serves them
all. What the weights are is read off the subject as it asks for them, or is the digest of the
directory they lie in; what a subject makes in its own way shows in the logits alone.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tpcheck import environment
from tpcheck.case_runs import CaseRuns
from tpcheck.comparison import error_count, pooled_rms
from tpcheck.errors import SubjectError
from tpcheck.evidence import Evidence
from tpcheck.execution import AGAIN
from tpcheck.explanations import explained
from tpcheck.golden.records import (
    LOGIT_DTYPES,
    Data,
    Floor,
    Golden,
    Identity,
    Logits,
    Named,
    data_file,
    identity_of,
)
from tpcheck.golden.tensors import pack
from tpcheck.groups.jobs import Job, JobFailed, Ranks
from tpcheck.inputs import Inputs, make_inputs
from tpcheck.model_digest import ModelDigest
from tpcheck.numerics.ulp import eps
from tpcheck.outputs import digest
from tpcheck.reference.streaming import Progress, stream_many
from tpcheck.spec import Case
from tpcheck.subjects import Subject

RECORDED_DEGREES = (2, 4, 8)
"""Whose lengths a record holds, whatever degrees it is verified at."""

BY_RANKS = "TP=1 of the subject"
BY_STREAMING = "the reference decoder, layer by layer"

_SAME_BITS = (
    *("torch", "cuda", "cpu", "cpu_capability", "gpu", "tf32", "float32_matmul_precision"),
    *("bf16_reduced_precision_reduction", "fp16_reduced_precision_reduction"),
    *("deterministic_algorithms", "device", "threads_per_rank", "compiled"),
)
_SAME_VARIABLES = ("MKL_", "CUBLAS_", "NVIDIA_TF32_")


@dataclass(frozen=True, slots=True)
class Alone:
    """TP=1 of a case: the outputs a record keeps, with what they rest on."""

    deployed: Mapping[str, torch.Tensor]
    oracle: Mapping[str, torch.Tensor] | None
    digests: Mapping[str, str]
    oracle_digests: Mapping[str, str]
    oracle_dtype: str
    floor: Floor
    base_error: float | None
    repeats: bool
    facts: Mapping[str, Any]
    made_by: str


def identify(
    ranks: Ranks, runs: CaseRuns, case: Case, directory: ModelDigest | None, timeout_s: float
) -> Identity:
    """Return what a case of a subject is: weights, config and inputs by digest.

    Raises:
        JobFailed: the subject raised when it was built at TP=1.
    """
    config: Mapping[str, Any]
    if directory is None:
        source, weights = _weighed(ranks, runs, timeout_s)
        spec = runs.subject.options.spec
        config = {} if spec is None else spec.to_fields()
    else:
        source = "directory"
        weights, config = of_directory(directory)
    return identity_of(
        source=source,
        weights=weights,
        config=config,
        inputs={key: _inputs_digest(one) for key, one in recorded_inputs(runs, case).items()},
        dtype=runs.dtype,
        tpcheck=environment.tpcheck_version(),
    )


def of_directory(directory: ModelDigest) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of a model directory's weights and of its config, by file."""
    files = {file.name: file.sha256 for file in directory.files}
    of_weights = (".safetensors", ".safetensors.index.json")
    weights = {name: one for name, one in files.items() if name.endswith(of_weights)}
    return weights, {name: one for name, one in files.items() if name not in weights}


def recorded_inputs(runs: CaseRuns, case: Case) -> Inputs:
    """Return the inputs of a case that a record holds: the same, whatever degrees are run."""
    return make_inputs(runs.subject, case, RECORDED_DEGREES)


def evidence_alone(runs: CaseRuns) -> Evidence:
    """Return TP=1's runs as evidence of degree 1, with the noise floor of its own casts.

    Raises:
        JobFailed: the subject raised, died or hung.
    """
    oracle, base = runs.oracle, runs.base
    alone = Evidence(
        dtype=runs.dtype,
        tp_size=1,
        base=base,
        deployed=[base],
        oracle=oracle,
        exact=[oracle] if oracle is not None and runs.subject.options.float64 else (),
        oracle_dtype=runs.oracle_dtype or runs.dtype,
        expected=1.0 if oracle is not None else math.sqrt(2.0),
        expected_source="TP=1 as recorded",
        base_error=runs.base_error_without_oracle,
        logits=runs.subject.options.logits,
    )
    return explained(runs, alone, "ring")[0]


def alone_on_ranks(runs: CaseRuns, case: Case) -> Alone:
    """Return what a record keeps of TP=1, run on ranks.

    Raises:
        JobFailed: the subject raised, died or hung.
    """
    evidence = evidence_alone(runs)
    base, oracle, floor = evidence.base, evidence.oracle, evidence.floor
    keys = [key for key in recorded_inputs(runs, case) if key in base.outputs]
    return Alone(
        deployed={key: base.outputs[key] for key in keys},
        oracle=None if oracle is None else {key: oracle.outputs[key] for key in keys},
        digests=base.digests,
        oracle_digests={} if oracle is None else oracle.digests,
        oracle_dtype="" if oracle is None else evidence.oracle_dtype,
        floor=Floor(_bounded(floor.relative_rms), floor.tier, floor.source),
        base_error=None if evidence.base_error is None else _bounded(evidence.base_error),
        repeats=base.digests.get(AGAIN) == base.digests.get("A"),
        facts=base.facts,
        made_by=BY_RANKS,
    )


def alone_streamed(
    runs: CaseRuns, case: Case, directory: Path, scratch: Path, progress: Progress | None
) -> Alone:
    """Return what a record keeps of TP=1 of a checkpoint that need not fit this machine.

    Args:
        scratch: a folder in which a killed run keeps how far it came.

    Raises:
        TPCheckError: the checkpoint cannot be read, or changed while it was.
    """
    inputs = recorded_inputs(runs, case)
    ids = [arguments[0] for arguments in inputs.values()]

    def streamed(dtype: str) -> dict[str, torch.Tensor]:
        logits = stream_many(
            directory,
            ids,
            dtype=dtype,
            weight_dtype=runs.dtype,
            scratch=scratch / dtype,
            progress=progress,
        )
        return dict(zip(inputs, logits, strict=True))

    oracle, deployed = streamed("float64"), streamed(runs.dtype)
    return Alone(
        deployed=deployed,
        oracle=oracle,
        digests={key: digest(one) for key, one in deployed.items()},
        oracle_digests={key: digest(one) for key, one in oracle.items()},
        oracle_dtype="float64",
        floor=Floor(0.0, "float64", "not measured: streamed"),
        base_error=None,
        repeats=True,
        facts={
            "device": "cpu",
            "compiled": False,
            "threads_per_rank": torch.get_num_threads(),
        },
        made_by=BY_STREAMING,
    )


def make_golden(
    subject: Subject,
    case: Case,
    identity: Identity,
    alone: Alone,
    *,
    label: str,
    together: tuple[Named, ...],
    full: bool,
    command: str,
    backend: str,
) -> tuple[Golden, bytes]:
    """Return a record and its data.

    Raises:
        SubjectError: nothing in the logits is finite, or their dtype cannot be kept.
    """
    logits = {key: _logits(subject, key, alone, identity.key.dtype) for key in alone.deployed}
    wide = alone.oracle or alone.deployed
    if not any(bool(one.isfinite().any()) for one in wide.values()):
        raise SubjectError(
            f"{subject.name}: TP=1 returns no finite number [{case.id}]: nothing to record"
        )
    data = pack(alone.deployed, alone.oracle, case_id=case.id, full=full)
    sha256 = hashlib.sha256(data).hexdigest()
    device = str(alone.facts.get("device", "cpu"))
    around = environment.collect(backend=backend, device=device)
    golden = Golden(
        subject=label,
        case_id=case.id,
        identity=identity,
        logits=logits,
        data=Data("", len(data), sha256),
        full=full,
        together=together,
        oracle_dtype=alone.oracle_dtype,
        made_by=alone.made_by,
        floor=alone.floor,
        base_error=alone.base_error,
        error_count=_error_count(alone),
        repeats=alone.repeats,
        environment=around | {"subject": dict(alone.facts)},
        command=command,
        created=environment.utc_now(),
    )
    return _with_data_file(golden), data


def environment_differences(golden: Golden, facts: Mapping[str, Any], made_by: str) -> list[str]:
    """Return what around a record may have rounded it otherwise: `torch 2.13.0, recorded 2.9.1`."""
    here = environment.collect(device=str(facts.get("device", "cpu"))) | {"subject": facts}
    return record_differences(replace(golden, environment=here, made_by=made_by), golden)


def record_differences(golden: Golden, held: Golden) -> list[str]:
    """Return what around two records may have rounded them otherwise."""
    here, there = _deciding(golden), _deciding(held)
    return [
        f"{name} {here.get(name)}, recorded {there.get(name)}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


def _deciding(golden: Golden) -> dict[str, Any]:
    around, facts = golden.environment, golden.environment.get("subject", {})
    facts = facts if isinstance(facts, Mapping) else {}
    names = (*_SAME_BITS, *(["transformers"] if golden.subject.startswith("hf:") else []))
    variables = around.get("variables")
    found = {name: facts.get(name, around.get(name)) for name in names}
    return (
        {"made by": golden.made_by}
        | found
        | {
            name: value
            for name, value in (variables.items() if isinstance(variables, Mapping) else ())
            if name.startswith(_SAME_VARIABLES)
        }
    )


def _weighed(ranks: Ranks, runs: CaseRuns, timeout_s: float) -> tuple[str, dict[str, str]]:
    task = replace(runs.task, order=("A",))
    result = ranks.run([Job("tpcheck.building:weigh", task, 1, timeout_s)])[0]
    if result.failure is not None:
        raise JobFailed(result.failure)
    source, weights = result.replies[0]
    return source, weights


def _inputs_digest(arguments: tuple[torch.Tensor, ...]) -> str:
    whole = hashlib.sha256()
    for tensor in arguments:
        held = tensor.detach().to("cpu").contiguous()
        whole.update(f"{held.dtype}{list(held.shape)}".encode())
        whole.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _logits(subject: Subject, key: str, alone: Alone, dtype: str) -> Logits:
    deployed = alone.deployed[key]
    wide = deployed if alone.oracle is None else alone.oracle[key]
    if deployed.shape != wide.shape:
        raise SubjectError(
            f"{subject.name}: {key} is {list(deployed.shape)} in {dtype}, but"
            f" {list(wide.shape)} in {alone.oracle_dtype}"
        )
    names = [str(one.dtype).removeprefix("torch.") for one in (deployed, wide)]
    for name in names:
        if name not in LOGIT_DTYPES:
            raise SubjectError(
                f"{subject.name}: {key} is {name}, but should be one of {', '.join(LOGIT_DTYPES)}"
            )
    error, rms, count = pooled_rms([(deployed, wide)])
    return Logits(
        shape=tuple(deployed.shape),
        dtype=names[0],
        deployed=alone.digests[key],
        oracle=alone.oracle_digests.get(key, ""),
        oracle_dtype="" if alone.oracle is None else names[1],
        rms=_bounded(rms) if count else None,
        epsilons=_bounded(error / (eps(dtype) * rms)) if count and rms else None,
    )


def _bounded(value: float) -> float:
    """Return a number that JSON can hold; what is beyond all floats is no smaller for it."""
    return value if math.isfinite(value) else sys.float_info.max


def _error_count(alone: Alone) -> float:
    """Return how many independent errors TP=1's own error rests on, from whole logits."""
    expected = alone.deployed if alone.oracle is None else alone.oracle
    return error_count([(logits, expected[key]) for key, logits in alone.deployed.items()])


def _with_data_file(golden: Golden) -> Golden:
    name = data_file(golden.stem, golden.data.sha256)
    return replace(golden, data=replace(golden.data, file=name))
