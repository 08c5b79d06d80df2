"""Argmax flips: which tokens another degree would choose, and by how much TP=1 preferred its own.

Requirement: a flip at a small margin is a tie that rounding decides, at a large one it is another
answer. The margins are in the profile that `tpcheck drift` adds to a verdict; without it, or with
tokens that could not be scored, nothing is known of flips, and that refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.deployment_gate.numbers import Lack, just_above, shown, size, whole
from tpcheck.deployment_gate.requirement import counted
from tpcheck.records import Verdict

_WHERE = "drift.profile"


def lack_of_flips(verdict: Verdict, limit: float) -> Lack | None:
    """Say what speaks against a verdict's flips; None if none has a margin above the limit."""
    check = verdict.checks.get("drift")
    profile = None if check is None else check.facts.get("profile")
    if check is None or not isinstance(profile, Mapping):
        why = "" if check is None else check.facts.get("profile_reason")
        because = f": {why}" if isinstance(why, str) and why else ""
        return Lack(f"{_WHERE} is missing, so no argmax flip is known{because}", missing=True)
    entries = profile.get("reductions")
    entries = entries if isinstance(entries, list | tuple) else []
    deployed = [one for one in entries if isinstance(one, Mapping) and one.get("deployed") is True]
    if len(deployed) != 1:
        found = f"{_WHERE}.reductions has {len(deployed)} that are deployed"
        return Lack(f"{found}, but should have one", missing=True)
    scores = deployed[0].get("scores")
    if not isinstance(scores, Mapping):
        why = deployed[0].get("scores_reason") or deployed[0].get("reason")
        because = f": {why}" if isinstance(why, str) and why else ""
        return Lack(f"{_WHERE} has no scores, so no argmax flip is known{because}", missing=True)
    unknown = _unknown_of_scores(scores)
    return Lack(unknown, missing=True) if unknown else _lack_of_margins(scores["flips"], limit)


def _unknown_of_scores(scores: Mapping[str, Any]) -> str:
    """Say why the margin of some flip is not known; nothing if every one is bounded."""
    if not whole(scores.get("tokens")):
        found = shown(scores.get("tokens"))
        return f"{_WHERE}.scores.tokens={found}, but should be at least 1"
    if whole(scores.get("tokens_not_finite")) != 0:
        found = shown(scores.get("tokens_not_finite"))
        return (
            f"{_WHERE}.scores.tokens_not_finite={found}, but should be 0: whether those tokens"
            " flip is not known"
        )
    flips = scores.get("flips")
    if not isinstance(flips, Mapping):
        return f"{_WHERE}.scores.flips={shown(flips)}, but should say which tokens flip"
    count, listed = whole(flips.get("count")), flips.get("first")
    if count is None or not isinstance(listed, list | tuple):
        named = "a list of the first" if isinstance(listed, list | tuple) else "no list of them"
        found = f"count={shown(flips.get('count'))} and {named}"
        return f"{_WHERE}.scores.flips has {found}, but should have both"
    margins = [size(one.get("tp1_margin")) if isinstance(one, Mapping) else None for one in listed]
    known = [margin for margin in margins if margin is not None]
    if len(known) != len(listed) or len(listed) > count:
        return (
            f"{_WHERE}.scores.flips has {count} flips and {len(known)} margins in a list of"
            f" {len(listed)}, but should have a margin each"
        )
    largest = size(flips.get("largest_margin"))
    if largest is None and len(listed) < count:
        return (
            f"{_WHERE}.scores.flips lists {len(listed)} of {count} flips, but should have the"
            " largest margin of all"
        )
    return ""


def _lack_of_margins(flips: Mapping[str, Any], limit: float) -> Lack | None:
    found = [size(one["tp1_margin"]) for one in flips["first"]]
    margins = [margin for margin in (*found, size(flips.get("largest_margin"))) if margin]
    highest = max(margins, default=0)
    if highest <= limit:
        return None
    text = f"{counted(flips['count'], 'argmax flip')} at a margin of up to"
    return Lack(f"{text} {just_above(highest, limit)}, but should be at most {limit:g}")
