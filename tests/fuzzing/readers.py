"""Every reader of a file that nobody vouches for: an example by the real writer, and its law.

Requirement: one table, so that a new reader is fuzzed by adding a row. `judge` puts altered bytes
where the reader looks, reads, and holds what was accepted against the law of its format:

- a format that promises integrity (receipt, golden record, streamed run's scratch) accepts what it
  wrote and nothing else, or only what says the same (a manifest's checksum is over values);
- a report or policy is accepted as exactly what stands there, survives its own round trip, and a
  gate's ALLOWED is one that laws.unproven finds proven too;
- safetensors are what the format's own library reads, name by name and bit by bit; a capture that
  differs in one bit is no PASS.

It returns "accepted" (something else, and as it stands there), "same" (nothing that counts
differs) or "refused" where a refusal is no exception; it raises TPCheckError where the reader
refuses, Violation where a law is broken, and anything else is a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tests.fuzzing.config_readers import configs, probes
from tests.fuzzing.gate_readers import digests, policies, receipts, reports
from tests.fuzzing.reader import Reader
from tests.fuzzing.record_readers import goldens, scratches
from tests.fuzzing.tensor_readers import captures, checkpoints, headers, rules

os.environ.setdefault("OMP_NUM_THREADS", "1")

MAKERS = (
    reports,
    policies,
    receipts,
    digests,
    goldens,
    headers,
    captures,
    rules,
    checkpoints,
    scratches,
    configs,
    probes,
)
"""Each makes its examples in a folder of its own and yields their readers."""


def make_readers(folder: Path) -> Iterator[Reader]:
    """Make every example below a folder and yield its reader.

    XDG_CACHE_HOME should be set: `require` keeps digests there.
    """
    for number, make in enumerate(MAKERS):
        inner = folder / f"{number:02}"
        inner.mkdir()
        yield from make(inner)
