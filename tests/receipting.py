"""What tests of receipts share: a report that a policy allows, its receipt, a model, a machine."""

import copy
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tpcheck.deployment_gate.decision import decide
from tpcheck.deployment_gate.issuing import make_receipt
from tpcheck.deployment_gate.policy import Policy
from tpcheck.deployment_gate.receipts import Receipt, write_receipt
from tpcheck.deployment_gate.requiring import Here
from tpcheck.deployment_gate.signing import new_key, sign
from tpcheck.model_digest import digest_directory
from tpcheck.records import Check, Report, Verdict
from tpcheck.records import Path as RunPath

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
MADE = NOW - timedelta(days=2)
GPU = "NVIDIA H200"
VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}

CHECKS = ("structural", "drift", "rank_agreement", "repeatability")

POLICY = Policy(
    tp=(2, 4),
    dtypes=("bfloat16",),
    backends=("nccl",),
    min_sensitivity=0.0,
    max_age_days=30.0,
)


def make_model(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"vocab_size": 8}')
    for n in (1, 2):
        (directory / f"model-{n}.safetensors").write_bytes(os.urandom(64))
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def make_report(model: Path, /, **changes: Any) -> Report:
    """Return what `tpcheck run hf:MODEL --tp 2,4` on two GPUs' worth of NCCL would leave."""
    digest = digest_directory(model)
    verdicts = tuple(
        Verdict("s0-b2-t16", tp_size, "bfloat16", "PASS", {name: Check("PASS") for name in CHECKS})
        for tp_size in (2, 4)
    )
    fields: dict[str, Any] = {
        "subject": f"hf:{model}",
        "verdicts": verdicts,
        "environment": {
            "torch": "2.13.0",
            "gpu": GPU,
            "gpu_models": [GPU],
            "gpu_count": 8,
            "nccl": "2.28.9",
            "nccl_library": "2.28.9",
            "nccl_settings": {"NCCL_ALGO": "Ring"},
            "driver": "570.86.15",
            "nodes": 1,
            "share": 0.5,
            "none": None,
        },
        "path": RunPath("nccl", {"all_reduce": 4}, True),
        "tpcheck": "0.1.0",
        "model": {
            "directory": str(model),
            "config_sha256": digest.config_sha256,
            "weights_sha256": digest.weights_sha256,
            "files": {file.name: file.sha256 for file in digest.files},
        },
        "engine": {
            "name": "transformers",
            "version": "5.23.0",
            "arguments": {"tp_sizes": [2, 4], "subject": {"attention": "sdpa"}},
        },
        "tested": tuple(
            {"tp_size": n, "dtype": "bfloat16", "batch": 2, "lengths": [1, n - 1, n, n + 1, 16]}
            for n in (2, 4)
        ),
        "reduction": {"kind": "ring", "basis": "assumed"},
        "created": MADE.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return Report(**{**fields, **changes})


def make_receipt_of(report: Report, policy: Policy = POLICY) -> Receipt:
    decision = decide(report, policy, NOW)
    assert decision.allowed, [refusal.reason for refusal in decision.refusals]
    return make_receipt(report, policy, decision, report_sha256="ab" * 32)


def make_here(**changes: Any) -> Here:
    fields: dict[str, Any] = {
        "gpus": (GPU,) * 8,
        "driver": "570.86.15",
        "nccl": "2.28.9",
        "settings": {"NCCL_ALGO": "Ring"},
        "version": VERSIONS.get,
    }
    return Here(**{**fields, **changes})


class Deployment:
    """A model, a key pair and a signed receipt in one folder."""

    def __init__(self, folder: Path) -> None:
        self.model = make_model(folder / "model")
        self.key = folder / "key"
        self.public = folder / "key.pub"
        self.path = folder / "receipt.json"
        new_key(self.key)
        self.receipt = sign(make_receipt_of(make_report(self.model)), self.key)
        write_receipt(self.receipt, self.path)

    def signed(self, **changes: Any) -> None:
        """Write another receipt, signed by the right key."""
        write_receipt(sign(replace(self.receipt, **changes), self.key), self.path)


def rendered(value: Any) -> bytes:
    """Write a value as tpcheck writes receipts, whatever it holds."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of everything in a JSON value that holds nothing itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, item in items:
        deeper = isinstance(item, dict | list) and item
        found += leaves(item, (*path, key)) if deeper else [(*path, key)]
    return found


def altered(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    made = copy.deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return made
