"""Policy: what has to be proven before a deployment starts, read from TOML. Torch-free.

Requirement: a policy means what its author thinks it means. A key that is not known, a value of
another type, a list that asks for nothing or names something twice is an error that names the key,
the value, what it should be and what was probably meant; nothing is guessed or passed over. `tp`,
`dtypes` and `backends` have no default: a policy that leaves one out would ask for nothing. WRONG,
ERROR and INCONCLUSIVE can never be let through.

[Allowed Outcomes] `allow = ["DRIFT"]` lets the outcome through, but a check named in `require` has
to PASS all the same: who lets drift through by its ratio leaves `drift` out of `require`, and
bounds it with `max_drift_ratio` or `max_epsilons`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from tpcheck.errors import TPCheckError
from tpcheck.files import read_toml
from tpcheck.json_reader import brief
from tpcheck.records import CHECK_NAMES, OUTCOMES

BACKENDS = ("nccl", "nccl-loopback", "gloo", "sim", "endpoint")
DTYPES = ("bfloat16", "float16", "float32")
DEFAULT_REQUIRE = ("structural", "drift", "rank_agreement", "repeatability")
NEVER_ALLOWED = ("WRONG", "ERROR", "INCONCLUSIVE")

_MOST = 1_000
"""Entries of a list: nobody proves more degrees, and each is looked up in all others."""

_CAN_BE_ALLOWED = tuple(name for name in OUTCOMES if name not in (*NEVER_ALLOWED, "PASS"))
_SCHEMA = "tpcheck.policy/1"


@dataclass(frozen=True, slots=True)
class Policy:
    """What a report has to prove. Built from any values, it holds only those that mean something.

    Args:
        tp: every one of these degrees has to be proven.
        dtypes: in every one of these deployed dtypes.
        backends: on every one of these backends; evidence from one never counts for another.
        require: checks that have to PASS in every verdict.
        require_deployed_path: the path tested has to be the deployed one.
        min_sensitivity: share of the faults planted in the subject that its checks caught; 0 asks
            for no measurement.
        min_cases: distinct cases per degree, dtype and backend.
        max_drift_ratio: TP=N's error over TP=1's.
        max_epsilons: TP=N's error in epsilons of the dtype.
        max_required_atol: the smallest atol at which allclose against TP=1 passes, with rtol 0.
        max_argmax_flip_margin: TP=1's margin, in logits, of a token that may flip.
        max_age_days: of the report.
        subject: the report's subject, where the policy is about one.
        engines: names, or name==version, one of which has to have carried the subject.
        allow: outcomes besides PASS that are let through. See [Allowed Outcomes].
        match: dotted path into the report's environment -> the value it has to have.

    Raises:
        TPCheckError: a value is not of its type or asks for nothing; names it.
    """

    tp: tuple[int, ...]
    dtypes: tuple[str, ...]
    backends: tuple[str, ...]
    require: tuple[str, ...] = DEFAULT_REQUIRE
    require_deployed_path: bool = True
    min_sensitivity: float = 0.95
    min_cases: int = 1
    max_drift_ratio: float | None = None
    max_epsilons: float | None = None
    max_required_atol: float | None = None
    max_argmax_flip_margin: float | None = None
    max_age_days: float | None = None
    subject: str | None = None
    engines: tuple[str, ...] | None = None
    allow: tuple[str, ...] = ()
    match: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read = {
            "tp": _degrees("tp", self.tp),
            "dtypes": _names("dtypes", self.dtypes, DTYPES),
            "backends": _names("backends", self.backends, BACKENDS),
            "require": _names("require", self.require, CHECK_NAMES),
            "require_deployed_path": _flag("require_deployed_path", self.require_deployed_path),
            "min_sensitivity": _share("min_sensitivity", self.min_sensitivity),
            "min_cases": _count("min_cases", self.min_cases),
            "max_drift_ratio": _limit("max_drift_ratio", self.max_drift_ratio, above=True),
            "max_epsilons": _limit("max_epsilons", self.max_epsilons, above=True),
            "max_required_atol": _limit("max_required_atol", self.max_required_atol),
            "max_argmax_flip_margin": _limit("max_argmax_flip_margin", self.max_argmax_flip_margin),
            "max_age_days": _limit("max_age_days", self.max_age_days, above=True),
            "subject": _text("subject", self.subject),
            "engines": None if self.engines is None else _names("engines", self.engines, ()),
            "allow": _allowed("allow", self.allow),
            "match": _flat("match", self.match),
        }
        for name, value in read.items():
            object.__setattr__(self, name, value)


def read_policy(path: str | os.PathLike[str]) -> Policy:
    """Read a policy from a TOML file with one table, `[policy]`.

    Raises:
        TPCheckError: the file cannot be read, is not TOML, or asks for something that means
            nothing; names the file and the key.
    """
    value = read_toml(path)
    if "policy" not in value:
        near = _near("policy", value)
        raise TPCheckError(f"{path}: [policy] is missing{f'; it has [{near}]' if near else ''}")
    try:
        return parse_policy(value)
    except TPCheckError as error:
        raise TPCheckError(f"{path}: {error}") from error


def parse_policy(value: Mapping[str, Any]) -> Policy:
    """Return the policy that a mapping holds, with or without its outer key `policy`.

    Raises:
        TPCheckError: as `read_policy`.

    Example:
        >>> parse_policy({"tp": [2], "dtypes": ["bfloat16"], "backends": ["nccl"]}).min_cases
        1
    """
    inner = value
    if "policy" in value:
        for name in value:
            if name != "policy":
                raise TPCheckError(
                    f"{name!s:.60}: is no table of a policy; its keys stand in [policy]"
                )
        inner = value["policy"]
    if not isinstance(inner, Mapping):
        _refuse("policy", inner, "a table", prefix="")
    known = [one.name for one in fields(Policy)]
    for name in inner:
        if name not in known:
            near = _near(str(name), known)
            meant = f"; did you mean {near}?" if near else f"; keys are {', '.join(known)}"
            raise TPCheckError(f"policy.{name!s:.60}: is no key of a policy{meant}")
        if inner[name] is None:
            _refuse(name, None, "a value, or left out")
    for name in ("tp", "dtypes", "backends"):
        if name not in inner:
            raise TPCheckError(f"policy.{name}: is missing, but should be {_EXAMPLES[name]}")
    return Policy(**inner)


def policy_json(policy: Policy) -> dict[str, Any]:
    """Return every field of a policy as plain JSON values, defaults included."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(policy)))
    return value


def policy_digest(policy: Policy) -> str:
    """Return the SHA-256 of what a policy asks for, in hexadecimal.

    Two policies that ask for the same have the same digest, whatever the order of their keys and
    lists, and whether a default is written out.
    """
    value = {
        name: sorted(item) if isinstance(item, list) else item
        for name, item in policy_json(policy).items()
    }
    text = json.dumps({"schema": _SCHEMA, **value}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_EXAMPLES = {
    "tp": "a list of degrees like [2, 4, 8]",
    "dtypes": 'a list like ["bfloat16"]',
    "backends": f"a list of some of {', '.join(BACKENDS)}: evidence from one never counts for"
    " another",
}


def _list(name: str, value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        _refuse(name, value, f"a list of {what}")
    if not value:
        _refuse(name, list(value), f"a list of at least one of {what}")
    if len(value) > _MOST:
        _refuse(name, list(value[:9]), f"a list of at most {_MOST}, not {len(value)}, of {what}")
    for i, item in enumerate(value):
        if item in value[:i]:
            _refuse(name, list(value), f"a list that names {item!r} once")
    return value


def _degrees(name: str, value: Any) -> tuple[int, ...]:
    for item in _list(name, value, "degrees"):
        if not _is_whole(item) or item < 1:
            _refuse(name, item, "a list of whole numbers of at least 1")
    return tuple(value)


def _names(name: str, value: Any, known: Sequence[str]) -> tuple[str, ...]:
    what = ", ".join(known) or "names"
    for item in _list(name, value, what):
        if not isinstance(item, str) or not item.strip():
            _refuse(name, item, f"a list of texts: {what}")
        if known and item not in known:
            _refuse(name, item, f"one of {what}", near=_near(item, known))
    return tuple(value)


def _allowed(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and not value:
        return ()
    for item in _list(name, value, ", ".join(_CAN_BE_ALLOWED)):
        if item in NEVER_ALLOWED:
            _refuse(name, item, f"{' or '.join(_CAN_BE_ALLOWED)}: {item} is never let through")
    return _names(name, value, _CAN_BE_ALLOWED)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return value


def _count(name: str, value: Any) -> int:
    if not _is_whole(value) or value < 1:
        _refuse(name, value, "a whole number of at least 1")
    return int(value)


def _share(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        _refuse(name, value, "a number from 0 to 1")
    return float(value)


def _limit(name: str, value: Any, *, above: bool = False) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value < 0 or (above and value == 0):
        _refuse(name, value, f"a finite number {'above' if above else 'of at least'} 0")
    return float(value)


def _text(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value.strip()):
        _refuse(name, value, "a text that is not empty")
    return value


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": 1}} as {"a.b": 1}; only what JSON can hold can be matched."""
    if not isinstance(value, Mapping):
        _refuse(name, value, "a table of environment fields and their values")
    found: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{name}.{key}"
        if not isinstance(key, str) or not all(key.split(".")):
            _refuse(name, key, "names of environment fields, like torch or variables.NCCL_ALGO")
        nested = isinstance(item, Mapping)
        if nested and not item:
            _refuse(path, dict(item), "a value, or a table that holds one")
        below = _flat(path, item) if nested else {"": item}
        if not nested:
            _require_matchable(path, item)
        for rest, leaf in below.items():
            dotted = f"{key}.{rest}" if rest else key
            if dotted in found:
                _refuse(name, dotted, "there once")
            found[dotted] = leaf
    return found


def _require_matchable(path: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _require_matchable(path, item)
    elif not isinstance(value, bool | str) and not _is_number(value):
        _refuse(path, value, "a text, a finite number, true, false or a list of them")


def _is_whole(value: Any) -> bool:
    # bool is an int to Python, but not to the author of a policy
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and bool(abs(value) <= 1 << 1000)  # beyond it no float can hold the number


def _is_number(value: Any) -> bool:
    if _is_whole(value):
        return True
    return isinstance(value, float) and math.isfinite(value)


def _near(name: str, known: Iterable[str]) -> str:
    lowered = {one.lower(): one for one in map(str, known)}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return lowered[found[0]] if found else ""


def _refuse(
    name: str, value: Any, expected: str, *, near: str = "", prefix: str = "policy."
) -> NoReturn:
    shown = brief(value, 60)
    meant = f"; did you mean {near!r}?" if near else ""
    raise TPCheckError(f"{prefix}{name:.80}={shown}, but should be {expected}{meant}")
