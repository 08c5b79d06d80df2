"""A report that proves everything and a policy that asks for all of it: gate tests start here.

Requirement: each refusal is shown by one change to evidence that is otherwise complete.
"""

import copy
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)

POLICY: Json = {
    "tp": [2, 4],
    "dtypes": ["bfloat16", "float16"],
    "backends": ["nccl"],
    "require": ["structural", "drift", "rank_agreement", "repeatability"],
    "min_cases": 2,
    "max_drift_ratio": 3.0,
    "max_epsilons": 2.0,
    "max_required_atol": 0.05,
    "max_argmax_flip_margin": 0.05,
    "max_age_days": 30,
    "subject": "models.py:build",
    "engines": ["vllm"],
    "match": {"torch": "2.13.0", "variables": {"NCCL_ALGO": "Ring"}},
}

PROFILE: Json = {
    "reductions": [
        {
            "reduction": "bfloat16",
            "deployed": True,
            "scores": {
                "tokens": 128,
                "tokens_not_finite": 0,
                "flips": {
                    "count": 1,
                    "first": [{"input": "A", "index": [1, 2], "tp1_margin": 0.0078125}],
                    "largest_margin": 0.0078125,
                },
            },
        },
        {
            "reduction": "int4_wire",
            "deployed": False,
            "scores": {
                "tokens": 128,
                "tokens_not_finite": 0,
                "flips": {"count": 1, "first": [{"tp1_margin": 9.0}], "largest_margin": 9.0},
            },
        },
    ]
}

CHECKS: Json = {
    "plan": {"outcome": "PASS"},
    "structural": {"outcome": "PASS", "relative_rms": 7e-16, "limit": 1e-12},
    "drift": {
        "outcome": "PASS",
        "ratio": 1.04,
        "expected": 1.41,
        "limit": 3.0,
        "epsilons": 0.93,
        "profile": PROFILE,
    },
    "allclose": {
        "outcome": "PASS",
        "atol": 0.0742,
        "rtol": 0.0,
        "decides": False,
        "required_atol": 0.0171,
    },
    "rank_agreement": {"outcome": "PASS"},
    "repeatability": {"outcome": "PASS"},
    "schedule": {"outcome": "PASS"},
    "tiling": {"outcome": "SKIPPED", "reason": "the subject exposes no shards"},
}


def verdict(case_id: str = "s0-b2-t16", tp_size: int = 2, dtype: str = "bfloat16") -> Json:
    """Return the JSON of a verdict in which everything passes."""
    return {
        "case_id": case_id,
        "tp_size": tp_size,
        "dtype": dtype,
        "outcome": "PASS",
        "checks": copy.deepcopy(CHECKS),
        "reasons": [],
        "first_divergence": None,
        "repro": f"tpcheck run models.py:build --tp {tp_size} --case {case_id}",
    }


def report_json() -> Json:
    """Return the JSON of a report that POLICY allows: two cases, two degrees, two dtypes."""
    return {
        "schema": "tpcheck.report/1",
        "outcome": "PASS",
        "subject": "models.py:build",
        "tpcheck": "0.1.0",
        "created": "2026-03-09T12:00:00Z",
        "environment": {
            "tpcheck": "0.1.0",
            "backend": "nccl",
            "torch": "2.13.0",
            "cuda": None,
            "tf32": False,
            "cores": 16,
            "variables": {"NCCL_ALGO": "Ring"},
        },
        "path": {
            "backend": "nccl",
            "collectives": {"all_reduce": 4},
            "same_as_deployed": True,
            "differences": [],
        },
        "engine": {"name": "vllm", "version": "0.11.0", "arguments": {"backend": "nccl"}},
        "sensitivity": {
            "caught": 116,
            "planted": 116,
            "blind_to": [],
            "smallest_scale_bug": "2^-37",
            "backend": "nccl",
            "case_id": "s0-b2-t16",
            "tp_size": 4,
            "dtype": "bfloat16",
        },
        "notes": [],
        "verdicts": [
            verdict(case_id, tp_size, dtype)
            for case_id in ("s0-b2-t16", "s1-b2-t16")
            for dtype in ("bfloat16", "float16")
            for tp_size in (2, 4)
        ],
    }
