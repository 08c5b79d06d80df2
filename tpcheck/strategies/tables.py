"""Head counts and FFN widths, sorted by the degrees at which the plan accepts them.

Requirement: strategies construct what is legal or illegal instead of drawing and throwing away, and
still restate no rule: candidates are proposed here, make_shard_plan's rules judge each one once per
question, and draws are picks from the judged tables.

[Picks Shrink] Entries ascend, MHA before GQA before MQA, and what breaks one rule comes before what
breaks two: Hypothesis shrinks towards the first entry.
[Same Number of Draws] Hypothesis holds a value made with fewer draws for the simpler one, whatever
it looks like. So a strategy draws equally often on every path, and drops what it has no use for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

from hypothesis import strategies as st

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.quantization import Quantization
from tpcheck.shard_plan import legal_tp_sizes
from tpcheck.shard_plan.units import shared_features
from tpcheck.spec import ModelSpec, RopeScaling

AWKWARD_HEADS = (25, 28, 36, 40, 52)
"""Head counts of published models that few degrees divide."""

DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Powers of two hide what goes wrong at 3, 6, 12, 24 and 48."""

DEFAULT_DEGREES = (2, 3, 4, 6, 8)

_WINDOW = 5
"""Of pinned layer_types that need one: inside most drawn lengths."""

_HEAD_DIM = 16
"""Under a pinned quantization: which head counts cut its units then depends on nothing drawn."""

_SMALL_HEADS, _SMALL_WIDTHS = 12, 8
"""How many of the smallest entries are drawn more often: small cases cost less."""

Pins = tuple[tuple[str, Any], ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Question:
    """What a shape should be: `legal` at all of `tp_sizes`, illegal (False) at all, or either.

    `pins` are fields of ModelSpec with one allowed value.
    """

    tp_sizes: tuple[int, ...]
    legal: bool | None
    max_heads: int
    max_intermediate: int
    pins: Pins = ()


class Group(NamedTuple, Generic[T]):
    """Entries that the plan accepts at the same degrees, `fits`, for the same reason, `label`."""

    fits: frozenset[int]
    label: str
    entries: tuple[T, ...]
    picks: st.SearchStrategy[T]


Heads = tuple[int, int]
"""num_attention_heads and num_key_value_heads."""

Pair = tuple[Group[Heads], Group[int]]


def questions(
    where: str,
    tp_size: int | Sequence[int] | None,
    legal: bool | None,
    *,
    max_heads: int | None = None,
    max_intermediate: int | None = None,
    pins: Mapping[str, Any] | None = None,
    among: Callable[[Question], Sequence[object]] | None = None,
    bounds: Mapping[str, int | None] | None = None,
) -> tuple[Question, ...]:
    """Return the questions that a strategy draws one of: one per degree where none is given.

    Args:
        where: the strategy, for messages.
        among: what is picked from: `pairs` by default; `head_answers`, `width_answers`.
        bounds: other bounds that were given, to be named where nothing can be drawn.

    Raises:
        TPCheckError: a degree, side or bound is malformed.
        PlanError: the pinned fields make no spec, or leave nothing to draw.
    """
    fields = _normal_pins(where, pins or {})
    alternatives = [(size,) for size in DEFAULT_DEGREES] if tp_size is None else [_sizes(tp_size)]
    _require_side(where, legal)
    asked = []
    for tp_sizes in alternatives:
        require_degrees(where, tp_sizes)
        least, unit = math.lcm(*tp_sizes), _shared(dict(fields))
        heads = _bound(where, "max_heads", max_heads, max(64, 2 * least))
        widths = _bound(where, "max_intermediate", max_intermediate, max(128, 4 * least * unit))
        asked.append(Question(tp_sizes, legal, heads, widths, fields))
    ModelSpec.from_fields(_probe_fields(asked[0], {}))
    found = tuple(question for question in asked if (among or pairs)(question))
    if not found:
        given = {"max_heads": max_heads, "max_intermediate": max_intermediate, **(bounds or {})}
        known = dict(fields) | {name: value for name, value in given.items() if value is not None}
        raise PlanError(_nothing(where, tp_size, legal, known))
    return found


@lru_cache(maxsize=256)
def pairs(question: Question) -> tuple[Pair, ...]:
    """Return the groups of heads and widths that together answer the question."""
    found = [
        (heads, width)
        for heads in head_groups(question)
        for width in width_groups(question)
        if answers(heads.fits & width.fits, question)
    ]
    return tuple(sorted(found, key=lambda pair: -len(pair[0].fits) - len(pair[1].fits)))


@lru_cache(maxsize=256)
def pair_picks(question: Question) -> st.SearchStrategy[Pair]:
    """Pick one of `pairs`: where either side will do, what is legal as often as all the rest."""
    found = pairs(question)
    wanted = frozenset(question.tp_sizes)
    legal = [pair for pair in found if pair[0].fits == wanted == pair[1].fits]
    return pick_equally(legal, found)


@lru_cache(maxsize=256)
def head_answers(question: Question) -> tuple[Group[Heads], ...]:
    """Return the groups of heads that answer the question whatever the width is."""
    return tuple(group for group in head_groups(question) if answers(group.fits, question))


@lru_cache(maxsize=256)
def width_answers(question: Question) -> tuple[Group[int], ...]:
    """Return the groups of widths that answer the question whatever the heads are."""
    return tuple(group for group in width_groups(question) if answers(group.fits, question))


def head_groups(question: Question) -> tuple[Group[Heads], ...]:
    """Return every head count within the bounds; the label "kv" marks what only KV heads break."""
    return _head_groups(question.tp_sizes, question.max_heads, question.pins)


def width_groups(question: Question) -> tuple[Group[int], ...]:
    """Return every intermediate_size within the bounds.

    The label "doubled" marks those that do not divide although gate and up together do.
    """
    return _width_groups(question.tp_sizes, question.max_intermediate, question.pins)


def pick(draw: st.DrawFn, groups: Sequence[Group[T]]) -> T:
    """Draw an entry of one of the groups, each group as often as any other."""
    group: Group[T] = draw(st.sampled_from(groups))
    return draw(group.picks)


def grouped(
    entries: Iterable[T],
    judge: Callable[[T], tuple[frozenset[int], str]],
    often: Callable[[tuple[T, ...]], Iterator[Sequence[T]]],
) -> tuple[Group[T], ...]:
    """Return entries by judgement: those legal at most degrees first (tables: [Picks Shrink]).

    Args:
        often: gives parts of a group's entries that are drawn as often as the whole.
    """
    found: dict[tuple[frozenset[int], str], list[T]] = {}
    for entry in entries:
        found.setdefault(judge(entry), []).append(entry)
    ordered = sorted(found.items(), key=lambda item: (-len(item[0][0]), sorted(item[0][0])))
    groups = []
    for (fits, label), members in ordered:
        whole = tuple(members)
        groups.append(Group(fits, label, whole, pick_equally(*often(whole), whole)))
    return tuple(groups)


def pick_equally(*parts: Sequence[T]) -> st.SearchStrategy[T]:
    """Pick from each part about as often as from any other, in one draw.

    See tables: [Same Number of Draws]. Shrinks towards the start of the first part.
    """
    longest = max(map(len, parts))
    repeated = (list(part) * (longest // len(part)) for part in parts if part)
    return st.sampled_from([entry for part in repeated for entry in part])


def answers(fits: frozenset[int], question: Question) -> bool:
    """Return whether what is legal at `fits` is on the side that the question asks for."""
    wanted = frozenset(question.tp_sizes if question.legal else ())
    return question.legal is None or fits == wanted


@lru_cache(maxsize=256)
def _head_groups(tp_sizes: tuple[int, ...], bound: int, pins: Pins) -> tuple[Group[Heads], ...]:
    question = Question(tp_sizes, None, bound, 0, pins)
    fitting = math.lcm(*tp_sizes) * _shared(dict(pins))

    def legal_at(heads: int, kv_heads: int) -> frozenset[int]:
        counts = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        return _legal_at(question, counts | {"intermediate_size": fitting})

    def judge(entry: Heads) -> tuple[frozenset[int], str]:
        fits = legal_at(*entry)
        only_kv = not fits and len(legal_at(entry[0], entry[0])) == len(set(tp_sizes))
        return fits, "kv" if only_kv else ""

    def often(entries: tuple[Heads, ...]) -> Iterator[Sequence[Heads]]:
        small = entries[:_SMALL_HEADS]
        yield small
        yield [*small, *(entry for entry in entries if entry[0] in AWKWARD_HEADS)]

    return grouped(_head_candidates(bound, dict(pins)), judge, often)


def _head_candidates(bound: int, pins: dict[str, Any]) -> Iterator[Heads]:
    """Propose every count up to the bound with every divisor of it as KV heads, MHA first."""
    pinned, pinned_kv = pins.get("num_attention_heads"), pins.get("num_key_value_heads")
    for heads in range(1, bound + 1) if pinned is None else (pinned,):
        for group in range(1, heads + 1):
            kv_heads, rest = divmod(heads, group)
            if not rest and pinned_kv in (None, kv_heads, 0 if group == 1 else None):
                yield heads, kv_heads


@lru_cache(maxsize=256)
def _width_groups(tp_sizes: tuple[int, ...], bound: int, pins: Pins) -> tuple[Group[int], ...]:
    question = Question(tp_sizes, None, 0, bound, pins)
    least = math.lcm(*tp_sizes) * _shared(dict(pins))
    heads = {"num_attention_heads": least, "num_key_value_heads": least}

    def judge(width: int) -> tuple[frozenset[int], str]:
        fits = _legal_at(question, heads | {"intermediate_size": width})
        twice = _legal_at(question, heads | {"intermediate_size": 2 * width})
        return fits, "doubled" if not fits and len(twice) == len(set(tp_sizes)) else ""

    def often(entries: tuple[int, ...]) -> Iterator[Sequence[int]]:
        yield entries[:_SMALL_WIDTHS]

    pinned = dict(pins).get("intermediate_size")
    widths = _width_candidates(bound, dict(pins)) if pinned is None else (pinned,)
    return grouped(widths, judge, often)


def _width_candidates(bound: int, pins: dict[str, Any]) -> list[int]:
    """Propose every width; of wide ones whole units of pinned scales, and what lies beside them."""
    unit = _shared(pins)
    near = {whole + off for whole in range(unit, bound + 1, unit) for off in (-1, 0, unit // 2)}
    return sorted(width for width in near | set(range(1, 129)) if 1 <= width <= bound)


def _legal_at(question: Question, fields: dict[str, int]) -> frozenset[int]:
    """Ask the plan at which of the degrees a spec with these fields is legal."""
    spec = ModelSpec(**_probe_fields(question, fields))
    return frozenset(question.tp_sizes).intersection(legal_tp_sizes(spec, max(question.tp_sizes)))


def _probe_fields(question: Question, fields: dict[str, int]) -> dict[str, Any]:
    """Return a spec in which nothing but pins and `fields` can be illegal: all else divides."""
    pins = dict(question.pins)
    least = math.lcm(*question.tp_sizes) * _shared(pins)
    heads = pins.get("num_attention_heads") or pins.get("num_key_value_heads") or least
    neutral: dict[str, Any] = {
        "vocab_size": least,
        "hidden_size": least,
        "intermediate_size": least,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "head_dim": 2,
    }
    return neutral | pins | fields


def _shared(pins: Mapping[str, Any]) -> int:
    """Return how many features share a scale or a word in the pinned quantization, at least 1."""
    quantization = pins.get("quantization")
    if quantization is None:
        return 1
    return math.lcm(*(shared_features(quantization, side) for side in (0, 1)))


def _normal_pins(where: str, pins: Mapping[str, Any]) -> Pins:
    """Return pins in one order, hashable, with what they imply for fields that are not pinned."""
    fields = dict(pins)
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, Mapping):
        fields["rope_scaling"] = scaling = RopeScaling.from_fields(scaling)
    if isinstance(fields.get("quantization"), Mapping):
        fields["quantization"] = Quantization.from_fields(fields["quantization"])
    if fields.get("quantization") is not None:
        fields.setdefault("head_dim", _HEAD_DIM)
    head_dim = fields.get("head_dim")
    if head_dim == 0:
        raise PlanError(
            f"{where}: head_dim=0, but should be at least 1: 0 derives it, and a strategy draws it"
        )
    if scaling is not None:
        fields.setdefault("position", "rope")
    if isinstance(head_dim, int) and head_dim % 2:
        fields.setdefault("position", "learned")
    if fields.get("num_experts"):
        fields.setdefault("mlp", "gated")
    if fields.get("swiglu_limit"):
        fields.setdefault("mlp", "gated")
        fields.setdefault("hidden_act", "silu")
    if isinstance(fields.get("layer_types"), Sequence):
        fields["layer_types"] = types = tuple(fields["layer_types"])
        if types:
            fields.setdefault("num_hidden_layers", len(types))
        if "sliding_attention" in types:
            fields.setdefault("sliding_window", _WINDOW)
    if fields.get("position") == "learned":
        fields.setdefault("rope_scaling", None)
    return tuple(sorted(fields.items()))


def _sizes(tp_size: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(tp_size) if isinstance(tp_size, Sequence) else (tp_size,)


def require_degrees(where: str, tp_sizes: Sequence[int]) -> None:
    """Raise unless there are degrees and all of them are whole numbers of at least 1."""
    for size in tp_sizes or (None,):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TPCheckError(
                f"{where}: tp_size={size!r}, but should be a whole number of at least 1"
            )


def _require_side(where: str, legal: bool | None) -> None:
    if legal not in (True, False, None):
        raise TPCheckError(f"{where}: legal={legal!r}, but should be True, False or None")


def _bound(where: str, name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TPCheckError(f"{where}: {name}={value!r}, but should be a whole number of at least 1")
    return value


def _nothing(where: str, tp_size: object, legal: bool | None, known: dict[str, Any]) -> str:
    side = {True: "legal", False: "illegal", None: "to be had"}[legal]
    facts = ", ".join(f"{name}={value}" for name, value in known.items())
    return (
        f"{where}: tp_size={tp_size}, but should be one at which something is {side}"
        f"{facts and f' [{facts}]'}\n  give other values or bounds, or ask for other degrees"
    )
