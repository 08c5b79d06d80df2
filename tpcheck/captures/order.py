"""In which order tensors are compared: the first that differs is where to look.

Requirement: `layers.2` stands before `layers.10`, and the user's own order, a list of names or
patterns, stands above that. A line that no name matches is reported: it is a typo.

[Told By Names] A safetensors file keeps no order of its own. Where neither its metadata nor the
user says one, tensors stand as decoders run, as far as the usual names tell: by the alphabet
`lm_head` came first, and `down_proj` before `up_proj`. A module's output stands after its parts'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tpcheck.errors import TPCheckError
from tpcheck.files import read_bounded
from tpcheck.json_reader import brief

MAX_BYTES = 1 << 24
"""Of an order file: a name each of some 100,000 tensors."""


_STEPS = tuple(
    re.compile(step)
    for step in (
        r"(?!embed_out).*embed.*|wte|wpe",
        r"input_layernorm|ln_1|attention_norm",
        r"[qkv]_proj|.*qkv.*|query|key|value|c_attn",
        r"[qk]_norm|rotary.*",
        r".*attn|.*attention",
        r"",  # whatever has another name
        r"o_proj|out_proj|linear_proj|dense|wo",
        r"post_attention_layernorm|pre_(feedforward|mlp)_layernorm|ln_2|ffn_norm",
        r"gate|router",
        r"gate_proj|up_proj|gate_up_proj|dense_h_to_4h|c_fc|(linear_)?fc1|w[13]",
        r"act.*",
        r"down_proj|dense_4h_to_h|c_proj|(linear_)?fc2|w2|.*expert.*",
        r"mlp|ffn|feed_forward|.*moe.*",
        r"post_(feedforward|mlp)_layernorm",
        r"norm|ln_f|final_layernorm|final_norm",
        r"lm_head|embed_out|output|output_layer|logits",
    )
)
"""What parts of names stand for, in the order in which they run."""

_OTHER = next(i for i, step in enumerate(_STEPS) if not step.pattern)


def forward_key(name: str) -> tuple[tuple[Any, ...], ...]:
    """Return a key that sorts names as a decoder runs; see [Told By Names].

    Example:
        >>> names = ["lm_head", "layers.0", "layers.0.mlp", "layers.0.self_attn", "embed_tokens"]
        >>> sorted(names, key=forward_key)
        ['embed_tokens', 'layers.0.self_attn', 'layers.0.mlp', 'layers.0', 'lm_head']
    """
    return (*((_step(part), natural_key(part)) for part in name.split(".")), (len(_STEPS),))


@lru_cache(maxsize=1 << 14)
def _step(part: str) -> int:
    return next((i for i, step in enumerate(_STEPS) if step.fullmatch(part)), _OTHER)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts numbers inside names by their value.

    Example:
        >>> sorted(["layers.10", "layers.2", "embed"], key=natural_key)
        ['embed', 'layers.2', 'layers.10']
    """
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    # text and numbers alternate, so that like is compared with like; huge numbers by their length
    return tuple(
        (len(part.lstrip("0")), 0, part.lstrip("0")) if i % 2 else (0, 1, part)
        for i, part in enumerate(parts)
    )


def read_order(path: str | Path) -> tuple[str, ...]:
    """Return the lines of an order file: one name or pattern each, `#` begins a comment.

    Raises:
        TPCheckError: the file cannot be read, is empty, or a line is no pattern.
    """
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
    except ValueError as error:
        raise TPCheckError(f"{path}: is not UTF-8 text: {error}") from error
    stripped = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
    lines = [(i, line) for i, line in stripped if line and not line.startswith("#")]
    if not lines:
        raise TPCheckError(f"{path}: is empty, but should hold a name or pattern per line")
    for i, line in lines:
        compile_pattern(line, f"{path}: line {i}")
    return tuple(line for _, line in lines)


def compile_pattern(text: object, where: str) -> re.Pattern[str]:
    """Return a regular expression that has to match a whole name.

    Raises:
        TPCheckError: it is none; names the place.
    """
    if not isinstance(text, str):
        raise TPCheckError(f"{where}={brief(text)}, but should be a regular expression")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise TPCheckError(
            f"{where}={brief(text)}, but should be a regular expression: {error}"
        ) from error


def in_order(
    names: Iterable[str], lines: Sequence[str], *, patterns: bool = True
) -> tuple[list[str], list[str]]:
    """Return the names in the order of the first line that matches each, and the unused lines.

    A line that is a name, letter by letter, goes before patterns; names that no line matches come
    last, as [Told By Names].
    """
    exact = {line: i for i, line in reversed(list(enumerate(lines)))}
    compiled = [re.compile(line) for line in lines] if patterns else []
    used: set[int] = set()
    found = []
    for name in names:
        at = exact.get(name)
        if at is None:
            matches = (i for i, one in enumerate(compiled) if one.fullmatch(name))
            at = next(matches, len(lines))
        used.add(at)
        found.append((at, forward_key(name), name))
    unused = [line for i, line in enumerate(lines) if i not in used]
    return [name for _, _, name in sorted(found)], unused
