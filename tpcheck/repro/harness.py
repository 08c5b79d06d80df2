"""What stands round a recorded program: weights, the ranks, the comparison.

Requirement: the script needs torch alone. Every rank is a generator that yields where ranks meet,
so that a difference in what they call is seen at once and nothing can hang.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def limit(dtype: str) -> float:
    """Return the relative difference up to which two programs agree.

    In float64 1e-9: far above what a changed order of a few sums leaves (1e-15), far below any bug.
    Else two steps of the dtype: what a few roundings leave is below one.
    """
    return 1e-9 if dtype == "float64" else 2 * torch.finfo(getattr(torch, dtype)).eps


_MEET = {
    "sum": "[sum(xs)] * n",
    "avg": "[sum(xs) / n] * n",
    "max": "[torch.stack(xs).amax(0)] * n",
    "min": "[torch.stack(xs).amin(0)] * n",
    "cat": "[torch.cat(xs, *how)] * n",
    "scatter": "list(sum(xs).chunk(n, *how))",
    "swap": "[torch.cat([x.chunk(n, how[0])[r] for x in xs], how[1]) for r in range(n)]",
    "from": "[xs[how[0]]] * n",
}


def recorded_script(
    *,
    title: str,
    inputs: Sequence[str],
    body: Sequence[str],
    tp_size: int,
    seed: int,
    weight_dtype: str,
    dtype: str,
    exact: bool,
    copies: bool,
    compared: bool,
    shapes: bool,
) -> tuple[list[str], list[str]]:
    """Return the lines that define `run(n)`, round a body of `model(n, r)`, and those that use it.

    Args:
        exact: draw the weights as tpcheck does, by their full names.
        copies: give every rank its own copy of what a collective returns.
        compared: compare with TP=1; else it is enough that ranks part.
        shapes: the results' shapes may differ.
    """
    text = "\n".join(body)
    weights = _exact_weights(seed, weight_dtype, text) if exact else _own_weights(text)
    weights = weights if "w(" in text else []
    if weights:
        stored = exact and weight_dtype == dtype
        cast = ".double()" if dtype == "float64" else f".to(torch.{dtype})"
        weights[-1] += "" if stored else cast
    joined = "\n".join(weights)
    modules = [name for name in ("hashlib", "math", "zlib") if f"{name}." in joined]
    imports = f"import {', '.join(sorted({*modules, 'sys'}))}, torch"
    head = f"# {title[:74]}: TP={tp_size}" + (" against TP=1" if compared else ", ranks part")
    defined = [
        head,
        imports + (", torch.nn.functional as F" if "F." in text else ""),
        *inputs,
        *weights,
        "def model(n, r):  # what rank r of n does; ranks meet where it yields",
        *body,
        *_run(text, copies),
    ]
    return defined, _comparison(tp_size, dtype, shapes) if compared else _meeting(tp_size)


def _exact_weights(seed: int, weight_dtype: str, text: str) -> list[str]:
    scale = "1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.5"
    parameter, scale = (", std=None", f"std or ({scale})") if "std=" in text else ("", scale)
    return [
        f"def w(name, *shape{parameter}):",
        f'    key = hashlib.blake2b(f"{seed}\\0{{name}}".encode(), digest_size=8).digest()',
        '    g = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)',
        f"    std = {scale}",
        f"    return (torch.randn(shape, generator=g) * std).to(torch.{weight_dtype})",
    ]


def _own_weights(text: str) -> list[str]:
    parameter = ", std=0.5" if "std=" in text else ""
    scale = "std" if parameter else "0.5"
    return [
        f"def w(name, *shape{parameter}):",
        "    g = torch.Generator().manual_seed(zlib.crc32(name.encode()))",
        f"    return (torch.randn(shape, generator=g) * {scale})",
    ]


def _run(text: str, copies: bool) -> list[str]:
    used = [op for op in _MEET if f'yield "{op}"' in text]
    after = "        got = [x.clone() for x in got]"
    return [
        "def run(n):",
        "    ranks, got = [model(n, r) for r in range(n)], [None] * n",
        "    while True:",
        "        calls = [rank.send(x) for rank, x in zip(ranks, got)]",
        "        (op, x, *how), xs = calls[0], [call[1] for call in calls]",
        "        if any((c[0], c[1].shape, *c[2:]) != (op, x.shape, *how) for c in calls):",
        '            sys.exit(f"ranks meet in {[(c[0], *c[1].shape) for c in calls]}")',
        '        if op == "end": return xs',
        *(f'        if op == "{op}": got = {_MEET[op]}' for op in used),
        *([after] if copies and used else []),
    ]


def _comparison(tp_size: int, dtype: str, shapes: bool) -> list[str]:
    wide = "" if dtype == "float64" else "double()."
    found = 'sys.exit(f"{list(many[0].shape)}, but should be {list(one.shape)}")'
    return [
        f"one, many = run(1)[0], run({tp_size})",
        *([f"if many[0].shape != one.shape: {found}"] if shapes else []),
        f"errors = [((y - one).{wide}norm() / one.{wide}norm()).item() for y in many]",
        f'print("relative difference from TP=1 in {dtype}, by rank:", *errors)',
        "same_bits = all(torch.equal(y, many[0]) for y in many)",
        f"sys.exit(not (same_bits and max(errors) < {limit(dtype):.3g}))",
    ]


def _meeting(tp_size: int) -> list[str]:
    return [f"run({tp_size})", 'print("all ranks made the same calls")']
