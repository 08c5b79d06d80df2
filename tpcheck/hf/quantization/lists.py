"""Which layers a quantization_config leaves unquantized, in the words of each tool.

Requirement: a list says the same layers as it does to the tool that wrote it. transformers takes a
name for a module and all below it, for a pattern, or for the end of a name; compressed-tensors
takes whole names, and patterns behind `re:`. All become patterns of Quantization.skip. What names
no linear layer of a decoder is left out: published lists name every norm of every layer.
"""

from __future__ import annotations

import re
from typing import Any

from tpcheck.hf.quantization.fields import refused

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_AROUND = ("model", "layers", "self_attn", "mlp", "experts", "shared_expert")
_MIXTRAL = (
    (r"block_sparse_moe", "mlp"),
    (r"\bw1\b", "gate_proj"),
    (r"\bw2\b", "down_proj"),
    (r"\bw3\b", "up_proj"),
)
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def skipped_by_transformers(name: str, value: Any) -> tuple[str, ...]:
    """Return the pattern of a modules_to_not_convert, none where it names no linear layer.

    Source: as transformers 5.23's quantizers_utils.should_convert_module decides it.
    """
    patterns = []
    for one in _names(name, value):
        if not _literal(one):
            patterns.append(f"(?:{_pattern(name, one)}){_BOUNDARY}")
        elif _may_name_a_linear(one):
            patterns += [f"{re.escape(one)}{_BOUNDARY}", f".*{re.escape(one)}$"]
    return _joined(patterns)


def all_but(targets: Any, ignore: Any) -> tuple[str, ...]:
    """Return the patterns of what compressed-tensors' targets and ignore leave out.

    Source: as compressed-tensors 0.20's utils.match decides it; "Linear" is the class of them all.
    """
    ignored, wanted = _names("ignore", ignore), _names("config_groups.targets", targets)
    if "Linear" in ignored or not wanted:
        raise refused("config_groups.targets", wanted, "names of layers that ignore leaves")
    relevant = [one for one in ignored if not _literal(one) or _may_name_a_linear(one)]
    skip = _joined([_exact("ignore", one) for one in relevant])
    if "Linear" in wanted:
        return skip
    reached = "|".join(_exact("config_groups.targets", one) for one in wanted)
    return (f"re:(?!{reached})", *skip)


def only(name: str, value: Any) -> tuple[str, ...]:
    """Return the pattern of all layers whose names end in none of these."""
    ends = "|".join(re.escape(one) for one in _names(name, value))
    return (f"re:(?!.*(?:{ends})$)",)


def matching(name: str, value: Any) -> tuple[str, ...]:
    """Return the pattern of all layers whose names begin with one of these patterns."""
    return _joined([f"(?:{_pattern(name, one)})" for one in _names(name, value)])


def _exact(name: str, one: str) -> str:
    if one.startswith("re:"):
        return f"(?:{_pattern(name, one.removeprefix('re:'))})"
    return f"{re.escape(one)}$"


def _names(name: str, value: Any) -> list[str]:
    """Return a list's names, with those of Mixtral's files turned into the decoder's."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise refused(name, value, "a list of names")
    return [_ours(one) for one in value]


def _ours(one: str) -> str:
    for theirs, ours in _MIXTRAL:
        one = re.sub(theirs, ours, one)
    return one


def _literal(one: str) -> bool:
    """Return whether a name is no pattern; its dots are meant as dots."""
    return re.fullmatch(r"[\w.]+", one) is not None


def _may_name_a_linear(one: str) -> bool:
    last = one.rstrip(".").rpartition(".")[2]
    below = last in _AROUND or last.isdigit()
    return below or any(linear.endswith(last) for linear in _LINEARS)


def _pattern(name: str, one: str) -> str:
    try:
        re.compile(one)
    except re.error as error:
        raise refused(name, one, f"a pattern: {error}") from error
    return one


def _joined(patterns: list[str]) -> tuple[str, ...]:
    return (f"re:(?:{'|'.join(patterns)})",) if patterns else ()
