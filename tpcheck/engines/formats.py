"""Which stored forms of weights an engine reads: one that it cannot open has no degree at all.

Requirement: a quantized checkpoint is never "ok" on an engine that does not read it. What an engine
surely reads and what it surely refuses is data with a source; a form that is neither is planned by
the engine's other rules, with a note that says so.
"""

from __future__ import annotations

from typing import NamedTuple

from tpcheck.engines.base import Finding, Rule
from tpcheck.engines.facts import Facts

MODULES_OF_THEIR_OWN = frozenset(
    "gptq gptq_marlin awq awq_marlin exl2 exl3 eetq hqq aqlm vptq spqr higgs quanto marlin".split()
)
"""Forms whose layers are modules of their own, no torch.nn.Linear."""


class Formats(NamedTuple):
    """What an engine does with stored forms, by the name of the method.

    Every method that is not in `reads` or `unsure` is refused, or only those in `refuses` where
    that is given. `text` is the engine's own with {method}, None where it has none; `why` says what
    happens; `fix` what to do instead.
    """

    source: str
    reads: frozenset[str]
    unsure: frozenset[str] = frozenset()
    refuses: frozenset[str] | None = None
    text: str | None = None
    why: str = ""
    fix: str = "load the checkpoint that is not quantized"

    def refused(self, method: str) -> bool:
        """Whether the engine surely does not read it."""
        if method in self.reads or method in self.unsure:
            return False
        return self.refuses is None or method in self.refuses

    def is_unknown(self, method: str) -> bool:
        """Whether nothing is known of it."""
        return method not in self.reads and not self.refused(method)


def reading(engine: str, formats: Formats) -> Rule:
    """Return the rule that refuses the forms an engine does not read."""

    def find(facts: Facts, tp_size: int) -> Finding | None:
        method = facts.method
        if method is None or not formats.refused(method):
            return None
        text = formats.text.format(method=method) if formats.text is not None else None
        reason = formats.why.format(method=method) or text or ""
        return Finding("error", reason, text, fix=formats.fix)

    return Rule(f"{engine}.formats", formats.source, find, ("quant",), "model")


def names(text: str) -> frozenset[str]:
    """Return the words of a list."""
    return frozenset(text.split())
