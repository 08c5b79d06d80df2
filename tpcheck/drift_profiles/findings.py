"""Sentences of a drift report, each with the numbers that it rests on.

Requirement: a reader who takes one line away takes one that was measured. A finding is there only
where there is something to say: which reduction the outputs show, which 16-bit dtype this model's
sums should travel in, what float32 on the wire buys, what a usual tolerance comes to, where drift
begins, how the deployed dtypes compare. Pure functions of profiles and of a summary's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpcheck.numerics.alarm import RATE, TOLERATED, Wealth
from tpcheck.numerics.identification import CONFIDENT
from tpcheck.numerics.named_orders import ORDERS
from tpcheck.numerics.tolerance import PRESETS

Json = dict[str, Any]

_SEED = PRESETS["seed-1e-2"][0]

_BLURRED = {
    "sent": "by the terms that were sent: TP=1 itself rounds more there",
    "exact": "with what TP=1 itself rounds there besides",
}
"""How layers are judged in which TP=1 errs by more than its output's rounding."""


def findings_of(profiles: Sequence[Json], rows: Sequence[Json]) -> list[Json]:
    """Return what the cases of one degree and dtype show.

    Args:
        profiles: of the cases.
        rows: a summary's, of the same degree and dtype.

    Returns:
        Each with `about`, `text` and numbers of its own. `about` is "reduction" (`identified`,
        `declared`, `raised`, `excess`, `count`), "float16_or_bfloat16" (`better`, `times`,
        `epsilons` by dtype), "float32_wire" (`ratio`, `instead`), "allclose" (`passes`,
        `required_both`) or "begins" (`fqn`, `most`: the point of the largest ratio).
    """
    found = [
        _reduction(profiles, rows[0]["dtype"]),
        _better(rows),
        _float32_wire(rows),
        _allclose(rows),
    ]
    return [one for one in (*found, _begins(profiles)) if one is not None]


def wrong_findings(profiles: Sequence[Json], rows: Sequence[Json]) -> list[Json]:
    """Say how far another function is, and where it first has other bits.

    Returns:
        Findings `about` "wrong" (`ratio`, `relative_rms`) and "begins", as `findings_of`.
    """
    own = next((row for row in rows if row["deployed"] and "reason" not in row), None)
    if own is None:
        return []
    far = "its error is not known: there is no oracle"
    if own["overflowed_outputs"]:
        far = f"{own['overflowed_outputs']} outputs are not finite where the oracle is"
    elif own["relative_rms"] is not None:
        far = f"it is {own['relative_rms']:.2g} of the output off the float64 TP=1"
        far += f", {own['ratio']:.3g} x TP=1's own error" if own["ratio"] is not None else ""
    text = f"not the same function, and not rounding: {far}"
    found: list[Json] = [
        {
            "about": "wrong",
            "ratio": own["ratio"],
            "relative_rms": own["relative_rms"],
            "text": text,
        }
    ]
    begins = _begins(profiles, "bits first differ")
    return found if begins is None else [*found, begins]


def compared_dtypes(rows: Sequence[Json]) -> list[Json]:
    """Say how bfloat16 and float16 as deployed compare at each degree, relative to the output.

    Returns:
        Findings `about` "dtypes", with `dtype`, `tp_size`, `text` and, of two that hold, `times`.
    """
    own = {(row["tp_size"], row["dtype"]): row for row in rows if row["deployed"]}
    found: list[Json] = []
    for tp_size in dict.fromkeys(size for size, _ in own):
        coarse, fine = own.get((tp_size, "bfloat16")), own.get((tp_size, "float16"))
        if coarse is None or fine is None:
            continue
        named: Json = {"about": "dtypes", "tp_size": tp_size}
        if fine["overflowed_outputs"]:
            text = f"deployed in float16, {fine['overflowed_outputs']} outputs are not finite"
            found.append({**named, "dtype": "float16", "text": text})
        elif coarse["relative_rms"] and fine["relative_rms"]:
            times = coarse["relative_rms"] / fine["relative_rms"]
            text = f"deployed in bfloat16 its error is {coarse['relative_rms']:.2g} of the output,"
            text += f" in float16 {fine['relative_rms']:.2g}: {times:.3g} x"
            found.append({**named, "dtype": "bfloat16", "times": times, "text": text})
    return found


def _reduction(profiles: Sequence[Json], dtype: str) -> Json | None:
    """Say which reduction the row-parallel layers show, and whether it is the declared one."""
    rows = [profile["rows"] for profile in profiles if profile.get("rows")]
    if not rows:
        return None
    declared = rows[0]["declared"]
    alarms = [row["reduction"]["alarm"] for row in rows]
    wealth = None if None in alarms else _pooled(alarms)
    found: Json = {
        "about": "reduction",
        "identified": list(dict.fromkeys(row["reduction"]["identified"] for row in rows)),
        "declared": declared,
        "raised": None,
    }
    if wealth is not None:
        found |= {"raised": wealth.alarm(), "excess": wealth.excess, "count": wealth.count}
        against = _against(wealth, declared)
    else:
        reason = next(r["reduction"]["alarm_reason"] for r in rows if not r["reduction"]["alarm"])
        against = f"no alarm can be raised, {reason}"
    said = [_named(r["reduction"]) + _unlike(r["reduction"], declared, dtype) for r in rows]
    others = "; in another case ".join(dict.fromkeys(said))
    return {**found, "text": f"{_held(rows[0])} {others}: {against}"}


def _held(row: Json) -> str:
    """Say how many outputs are spoken of, and by which terms of the ranks."""
    count = len(row["layers"])
    seen = row.get("terms") == "sent"
    text = f"{count} {'sum' if seen else 'row-parallel layer'}{'s' if count != 1 else ''}"
    text += " over ranks" if seen else ""
    for by, said in _BLURRED.items():
        blurred = sum(
            one.get("terms") == by and one.get("tp1_excess", 1.0) > TOLERATED
            for one in row["layers"]
        )
        some = f"{blurred} of them " if blurred < count else ""
        text += f" ({some}{said})" if blurred else ""
    return f"{text} {'show' if count != 1 else 'shows'}"


def _named(reduction: Json) -> str:
    """Say what was identified; what gives the same bits is one phrase per dtype on the wire."""
    said = str(reduction["identified"])
    for finding in reduction["findings"]:
        names = finding["hypotheses"]
        if len(names) > 2:
            said = said.replace(" = ".join(names), _one_of(names))
    return said


def _unlike(reduction: Json, declared: str, dtype: str) -> str:
    """Say that what was identified for certain is another kind than the declared one.

    An alarm says so by itself: this is for kinds whose errors are as large.
    """
    first, alarm = reduction["findings"][0], reduction["alarm"]
    sure = first.get("explains") and first["probability"] >= CONFIDENT
    if not sure or (alarm is not None and alarm["raised"]):
        return ""
    like = any(_is_kind(name, declared, dtype) for name in first["hypotheses"])
    return "" if like else f", not the declared {declared}"


def _one_of(names: Sequence[str]) -> str:
    wires: dict[str, list[str]] = {}
    for name in names:
        kind, _, wire = name.rpartition(" in ")
        wires.setdefault(wire, []).append(kind)
    said = [f"{_orders(kinds)} in {wire}" for wire, kinds in wires.items()]
    return f"one of {'; '.join(said)} (the same bits here)"


def _is_kind(name: str, declared: str, dtype: str) -> bool:
    """Whether a hypothesis is of the declared kind in a dtype: an ascending ring is a ring."""
    kind, _, wire = name.rpartition(" in ")
    declared = "ring" if (declared, dtype) == ("fp32_wire", "float32") else declared
    return wire == dtype and kind.endswith(declared)


def _orders(kinds: Sequence[str]) -> str:
    """Say several orders in one phrase; all of them are any, and what goes by no order follows."""
    if not set(ORDERS) <= set(kinds):
        return ", ".join(kinds)
    return ", ".join(["any order", *(kind for kind in kinds if kind not in ORDERS)])


def _pooled(alarms: Sequence[Mapping[str, Any]]) -> Wealth:
    """Return the wealth of bets placed one case after the other."""
    names = ("squares", "expected", "wider", "narrower")
    totals = {name: sum(float(one[name]) for one in alarms) for name in names}
    return Wealth(count=sum(one["count"] for one in alarms), **totals)


def _against(wealth: Wealth, declared: str) -> str:
    if not wealth.count:
        return "nothing to hold against a declared reduction"
    if not wealth.alarm():
        return f"errors {wealth.excess:.3g} x those of the declared {declared}, no alarm"
    said = "ALARM, errors are" if wealth.alarm() == "wider" else "not as declared, errors are only"
    return (
        f"{said} {wealth.excess:.3g} x those of the declared {declared}, over"
        f" {wealth.count} outputs (by chance once in {1 / RATE:,.0f} runs at most)"
    )


def _better(rows: Sequence[Json]) -> Json | None:
    """Say which of the 16-bit dtypes this model's sums should travel in, by measurement."""
    found = {row["reduction"]: row for row in rows if row["reduction"] in ("float16", "bfloat16")}
    if len(found) < 2 or any("reason" in row for row in found.values()):
        return None
    numbers = {name: row["epsilons"] for name, row in found.items()}
    named: Json = {"about": "float16_or_bfloat16", "epsilons": numbers}
    largest = max(row["largest_partial"] or 0.0 for row in found.values())
    lost = [name for name, row in found.items() if row["overflowed_outputs"]]
    if lost:
        held = next((name for name in found if name not in lost), None)
        head = f"{held} on the wire is better: " if held else "neither 16-bit dtype will do: "
        count = found[lost[0]]["overflowed_outputs"]
        why = f"{lost[0]} overflows, {count} outputs are not finite"
        why += f" (largest |partial| {largest:.3g} against 65504)"
        return {**named, "better": held, "text": head + why}
    if None in numbers.values():
        return None
    best, worst = sorted(found, key=lambda name: numbers[name])
    times = numbers[worst] / numbers[best] if numbers[best] else 1.0
    room = _room(largest, found[best]["float16_headroom"])
    if _told_apart(found[best], found[worst]) and not _same_digits(times, 1.0):
        text = f"{best} on the wire is better: error {numbers[best]:.3g} eps against"
        text += f" {numbers[worst]:.3g} with {worst}, {times:.3g} x{room}"
        return {**named, "better": best, "times": times, "text": text}
    text = f"float16 or bfloat16 on the wire makes no measured difference: {numbers[best]:.3g} eps,"
    text += f" {numbers[worst]:.3g} eps{room}"
    return {**named, "better": None, "times": times, "text": text}


def _room(largest: float, spare: float | None) -> str:
    if not spare:
        return ""
    times = f"{spare:,.0f}" if spare >= 10 else f"{spare:.2g}"
    return f"; largest |partial| {largest:.3g}, room in float16 for {times} x"


def _same_digits(a: float, b: float) -> bool:
    """Whether two numbers are written alike: thousands of outputs tell apart what none can use."""
    return f"{a:.3g}" == f"{b:.3g}"


def _told_apart(best: Json, worst: Json) -> bool:
    """Whether intervals leave no doubt which error is larger; those of the same tokens first."""
    for row, other in ((best, worst), (worst, best)):
        if other["deployed"] and row["over_deployed_interval"]:
            low, high = row["over_deployed_interval"]
            return bool(high < 1 if row is best else low > 1)
    if not best["interval"] or not worst["interval"]:
        return False
    return bool(best["interval"][1] < worst["interval"][0])


def _float32_wire(rows: Sequence[Json]) -> Json | None:
    """Say what float32 on the wire buys over what is deployed."""
    named = {row["reduction"]: row for row in rows if not row["deployed"]}
    wide, own = named.get("float32"), next((row for row in rows if row["deployed"]), None)
    if wide is None or own is None or None in (wide.get("ratio"), own.get("ratio")):
        return None
    text = f"float32 on the wire: {wide['ratio']:.3g} x TP=1's error instead of {own['ratio']:.3g}"
    if _same_digits(wide["ratio"], own["ratio"]) or not _told_apart(wide, own):
        text += ", no measured difference"
    return {"about": "float32_wire", "ratio": wide["ratio"], "instead": own["ratio"], "text": text}


def _allclose(rows: Sequence[Json]) -> Json | None:
    """Say what the tolerance that people try first comes to here."""
    own = next((row for row in rows if row["deployed"] and "reason" not in row), None)
    if own is None or own["required_both"] is None:
        return None
    needed = own["required_both"]
    passes = needed <= _SEED
    said = "passes" if passes else "fails"
    text = f"allclose(1e-2, 1e-2) against TP=1 {said}; {needed:.2g} for both is needed"
    return {"about": "allclose", "passes": passes, "required_both": needed, "text": text}


def _begins(profiles: Sequence[Json], what: str = "drift begins") -> Json | None:
    """Say where TP=N first has other bits, and after which layer it is furthest from TP=1."""
    depths = [profile["depth"] for profile in profiles if profile.get("depth")]
    begun = [one for one in depths if one["begins"]]
    if not begun:
        return None
    points = [point for one in begun for point in one["points"] if point["ratio"] is not None]
    text = f"{what} in {begun[0]['begins']}"
    lost = [point for one in begun for point in one["points"] if point.get("not_finite")]
    text += f"; after {lost[0]['fqn']} values are not finite" if lost else ""
    most = max(points, key=lambda point: float(point["ratio"]), default=None)
    if most is not None:
        text += f"; the largest ratio is {most['ratio']:.3g}, after {most['fqn']}"
    return {"about": "begins", "fqn": begun[0]["begins"], "most": most, "text": text}
