"""ExLlamaV2 0.3: splits by the memory of each device, in KV heads, 128-wide and 32-wide units.

Requirement: an uneven split is the design and no finding, also when a device holds no KV head; only
an MLP that is not whole 128-wide units, or an architecture without support, is refused. Source:
commit da07facd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpcheck.engines.base import Engine, Finding, Rule
from tpcheck.engines.facts import Facts, ceil_div, round_up
from tpcheck.engines.formats import Formats, names, reading

_SOURCE = "exllamav2/tensor_p.py"
_NO_TP = frozenset(
    "mixtral yi orion gemma gemma2 gemma3 gemma3_text starcoder2 cohere cohere2 dbrx phi3 gpt2"
    " gpt_bigcode minicpm internlm2 granite".split()
)
"""Model types that have a loader without support; an unknown one is loaded as a llama."""


FORMATS = Formats(
    "exllamav2/module.py:112-143",
    names("exl2 gptq"),
    why="ExLlamaV2 reads EXL2 and GPTQ, and no {method}",
    fix="convert the unquantized checkpoint to EXL2",
)


def _split_format(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1 or facts.method != "gptq":
        return None
    text = "Can only split fully loaded EXL2 tensor."
    return Finding("error", f"{text} (the checkpoint is GPTQ)", text, fix=FORMATS.fix)


def _width(facts: Facts, tp_size: int) -> Finding | None:
    width = facts.intermediate_size
    assert width is not None
    if width % 128 == 0 or tp_size == 1:
        return None
    text = "Model intermediate size must be divisible by 128"
    fix = f"pad intermediate_size to {round_up(width, 128)}"
    return Finding("error", text, text, fix=fix)


def _architecture(facts: Facts, tp_size: int) -> Finding | None:
    if tp_size == 1 or facts.model_type not in _NO_TP:
        return None
    text = f"Tensor-parallel is not supported for {facts.architecture or facts.model_type}"
    return Finding("error", text, text)


def integer_split(total: int, weights: Sequence[float], least: int = 0) -> list[int]:
    """Share out whole units by weight, the largest remainders first.

    A share below `least` goes to the smallest shares that are left, or to the last device.
    """
    whole = sum(weights)
    ideal = [total * weight / whole for weight in weights]
    shares = [int(share) for share in ideal]
    order = sorted(range(len(shares)), key=lambda i: (shares[i] - ideal[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    freed = sum(share for share in shares if share < least)
    shares = [share if share >= least else 0 for share in shares]
    for _ in range(freed):
        taken = [(share, i) for i, share in enumerate(shares) if share]
        shares[min(taken)[1] if taken else -1] += 1
    return shares


def _memory(facts: Facts, tp_size: int) -> tuple[float, ...]:
    if facts.memory and len(facts.memory) == tp_size:
        return facts.memory
    return (1.0,) * tp_size


def _sizes(facts: Facts, tp_size: int) -> dict[str, Any]:
    memory = _memory(facts, tp_size)
    found = {}
    if facts.num_key_value_heads:
        found["kv_heads"] = integer_split(facts.num_key_value_heads, memory)
    for name, size, unit, least in (
        ("intermediate", facts.intermediate_size, 128, 2),
        ("resid", facts.hidden_size, 32, 8),
        ("vocab", facts.vocab_size, 32, 16),
    ):
        if size:
            units = ceil_div(size, unit) if name == "vocab" else size // unit
            found[name] = [share * unit for share in integer_split(units, memory, least)]
    return {"split": found}


RULES = (
    reading("exllamav2", FORMATS),
    Rule(
        "exllamav2.split_format",
        "exllamav2/linear.py:540-549",
        _split_format,
        ("quant",),
        "model",
    ),
    Rule("exllamav2.arch", f"{_SOURCE}:56-57", _architecture, area="model"),
    Rule("exllamav2.mlp", f"{_SOURCE}:58-59", _width, ("intermediate_size",), "model"),
)

ENGINE = Engine("exllamav2", "0.3.2 (da07facd)", RULES, (("any", (), _sizes),), splits_towers=False)
