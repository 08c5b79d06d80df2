"""Every tensor that a config implies, under the names that this checkpoint uses.

Requirement: what should be there follows from the config alone; what is there decides only between
spellings of the same thing (Mixtral's names or one tensor for all experts, GPT-2 with or without
its prefix).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

from tpcheck.engines.facts import Facts
from tpcheck.header_check.dimensions import Dim, Expected, parse_dims
from tpcheck.header_check.families import Family, Rows, vocabulary
from tpcheck.header_check.packing import NAMES, is_left_out, storing
from tpcheck.plan_memory import sparse_layers


def expected_tensors(
    facts: Facts, config: Mapping[str, Any], family: Family, names: Set[str]
) -> dict[str, Expected]:
    """Return what a checkpoint with these names should hold."""
    words = vocabulary(facts, config, family)
    tensors: dict[str, Expected] = {}
    for name, dims in _rows(facts, config, family, names):
        tensors |= _stored(name, parse_dims(dims, words), facts, family, names)
    drop = family.optional_prefix
    if drop and names and not any(name.startswith(drop) for name in names):
        return {name.removeprefix(drop): one for name, one in tensors.items()}
    return tensors


def missing_fields(facts: Facts, config: Mapping[str, Any], family: Family) -> list[str]:
    """Return the symbols of a family that the config does not say, as its fields."""
    words = vocabulary(facts, config, family)
    rows = [*family.outside.values(), *family.layer.values()]
    rows += family.dense.values() if not facts.num_experts else ()
    rows += family.sparse[0].values() if facts.num_experts and family.sparse else ()
    needed = {symbol for dims in rows for symbol in dims.replace("+", " ").split()}
    lacking = sorted({_FIELDS[symbol] for symbol in needed - set(words)})
    return lacking if facts.num_hidden_layers else [*lacking, "num_hidden_layers"]


_FIELDS = {
    **dict.fromkeys("DH1", "hidden_size"),
    "V": "vocab_size",
    **dict.fromkeys("QKUOh", "num_attention_heads"),
    "I": "intermediate_size",
    **dict.fromkeys("EW", "moe_intermediate_size"),
    "S": "shared_expert_intermediate_size",
    "N": "num_experts",
    "X": "max_position_embeddings",
    "A": "q_lora_rank",
    "B": "qk_nope_head_dim",
    **dict.fromkeys("CR", "kv_lora_rank"),
    "P": "v_head_dim",
    **dict.fromkeys("pxy", "patch_size"),
    "m": "num_mel_bins",
    "s": "max_source_positions",
    **dict.fromkeys("Gg", "hidden_size"),
}


def _rows(
    facts: Facts, config: Mapping[str, Any], family: Family, names: Set[str]
) -> Iterator[tuple[str, str]]:
    """Yield every tensor's full name and its dims."""
    biases = family.biases(config)
    yield from _with_biases("", family.outside, biases, family)
    if not config.get("tie_word_embeddings", family.tied):
        yield from family.head.items()
    sparse = set(sparse_layers(facts, config)) if family.sparse else set()
    experts = _spelling(family, names) if sparse else {}
    for layer in range(facts.num_hidden_layers or 0):
        prefix = family.layers.format(i=layer)
        yield from _with_biases(prefix, family.layer, biases, family)
        mlp = experts if layer in sparse else family.dense
        yield from _with_biases(prefix, dict(_each(mlp, facts.num_experts or 0)), biases, family)


def _spelling(family: Family, names: Set[str]) -> Rows:
    """Return the rows most of whose names the checkpoint has."""
    ends = {name.partition(".layers.")[2].partition(".")[2] for name in names}
    modules = {end.rpartition(".")[0] for end in ends} | ends

    def known(rows: Rows) -> int:
        return sum(
            name.format(e=0).removesuffix(".weight") in modules or name.format(e=0) in modules
            for name in rows
        )

    return max(family.sparse, key=lambda rows: known(rows) / len(rows))


def _each(rows: Rows, experts: int) -> Iterator[tuple[str, str]]:
    for name, dims in rows.items():
        if "{e}" not in name:
            yield name, dims
            continue
        for expert in range(experts):
            yield name.format(e=expert), dims


def _with_biases(
    prefix: str, rows: Rows, biases: Iterable[str], family: Family
) -> Iterator[tuple[str, str]]:
    wanted = tuple(biases)
    for name, dims in rows.items():
        yield prefix + name, dims
        module = name.removesuffix(".weight")
        if module.endswith(wanted) and module != name:
            first, last = dims.split()[0], dims.split()[-1]
            yield f"{prefix}{module}.bias", last if family.conv1d else first


def _stored(
    name: str, dims: tuple[Dim, ...], facts: Facts, family: Family, names: Set[str]
) -> dict[str, Expected]:
    """Return a logical weight as it is stored: itself, or packed with its scales."""
    plain = {name: Expected(dims)}
    quant = facts.quant
    how = storing(quant) if quant is not None else None
    if quant is None or how is None or not _is_quantizable(name, dims, raw=how.raw):
        return plain
    if is_left_out(name, quant) or (_is_router(name) and name in names):
        return plain
    *stack, out, into = dims
    if family.conv1d or how.raw:
        out, into = into, out
    module = name.removesuffix("weight")
    stored = {
        f"{module}{end}": replace(one, dims=(*stack, *one.dims))
        for end, one in how.stores(quant, out, into).items()
    }
    renamed = NAMES.get(quant.method, {})
    if f"{module}{renamed.get('weight')}" in names:
        stored = {
            f"{module}{renamed.get(end, end)}": one
            for end, one in ((key.removeprefix(module), one) for key, one in stored.items())
        }
    other = f"{module}weight_scale_inv"
    if f"{module}weight_scale" in stored and other in names:  # transformers' name of it
        stored[other] = stored.pop(f"{module}weight_scale")
    return stored


def _is_quantizable(name: str, dims: tuple[Dim, ...], *, raw: bool) -> bool:
    """Whether methods quantize it: the layers' matrices; `raw` ones only what has no `.weight`."""
    if ".layers." not in name and ".h." not in name:
        return False
    return len(dims) == 3 if raw else len(dims) == 2 and name.endswith(".weight")


def _is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight", ".shared_expert_gate.weight"))
