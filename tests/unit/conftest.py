"""Every test of a reader runs under the audit hook: nothing that it reads is unpickled or run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzzing.audit import no_code_from_files

READERS = frozenset(
    "test_captures test_captures_reading test_captures_rules test_cli_gate test_cli_receipts"
    " test_fuzz_readers test_golden test_golden_command test_header_check"
    " test_header_packing test_header_parts test_hf_quantization test_model_digest test_packing"
    " test_plan_command test_policy test_probe_command test_quantized_reading test_receipts"
    " test_reference test_report test_requiring test_signing test_streaming".split()
)
"""Modules of tests of what reads a report, policy, receipt, key, record, capture or checkpoint."""


@pytest.fixture(autouse=True)
def nothing_read_is_unpickled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a reader's test in which code came out of a file, also where the reader swallowed it."""
    if request.module.__name__.rpartition(".")[2] not in READERS:
        yield
        return
    with no_code_from_files() as seen:
        yield
    assert not seen
