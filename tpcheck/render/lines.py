"""Lines of text for a terminal: sentences that end where it does, and plain tables."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from tpcheck.render.text import WIDTH


def wrapped(*texts: str, indent: str = "  ") -> list[str]:
    """Return sentences as lines, `indent` before those that go on; words stay whole."""
    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    ]


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> list[str]:
    """Return rows of text below their headers, as they are."""
    text = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
    return [line.rstrip() for line in text.splitlines()]
