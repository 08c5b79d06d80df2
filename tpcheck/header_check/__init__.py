"""Hold a checkpoint's headers against its config, and prove that ranks' parts tile it. Torch-free.

Requirement: a checkpoint that cannot be split, or is not the model that its config describes, is
found out from a few megabytes of headers: every tensor's shape and dtype, what is missing or too
much, quantized weights against their packing with scales beside them, and every logical sub-block
held exactly once at each degree. Names that no table here knows are listed, not guessed.

Read on: `headers` reads, `dimensions` are the words, `families` and `packing` the tables,
`expected` puts them together, `tiling` proves, `findings` words it.
"""

from __future__ import annotations

from tpcheck.header_check.findings import Findings, header_findings
from tpcheck.header_check.headers import read_headers

__all__ = ["Findings", "header_findings", "read_headers"]
