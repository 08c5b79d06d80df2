"""What a checkpoint's headers say about its config and its degrees, in sentences.

Requirement: one line per problem, naming the tensor, what it is and what it should be; the same
problem in eighty layers is one line with their count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.engines.base import quant_grain
from tpcheck.engines.facts import Facts
from tpcheck.engines.parts import part_fields, read_parts
from tpcheck.errors import PlanError
from tpcheck.header_check.dimensions import Expected
from tpcheck.header_check.expected import expected_tensors, missing_fields
from tpcheck.header_check.families import FAMILIES, Family
from tpcheck.header_check.headers import Header, Headers, read_headers
from tpcheck.header_check.packing import storing
from tpcheck.header_check.part_names import PartNames, names_by_part
from tpcheck.header_check.tiling import cuts_at, tiling_problems
from tpcheck.header_check.towers import TOWERS
from tpcheck.json_reader import brief
from tpcheck.plan_memory import sparse_layers
from tpcheck.spec import ModelSpec

_SHOWN, _MOST = 3, 1_000_000
_DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".kv_scale")
"""Tables that change nothing: they are computed from the config."""
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found: `problems` at any degree, and per degree those of its split.

    Without a table of the family's tensors nothing is compared, which is not the same as no
    problem.
    """

    files: int
    tensors: int
    compared: bool = True
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    by_degree: Mapping[int, tuple[str, ...]] | None = None
    not_split: Mapping[int, str] | None = None
    ways: Mapping[int, str] | None = None

    def to_json(self, tp_size: int) -> dict[str, Any]:
        """Return what concerns one degree."""
        mine = (self.by_degree or {}).get(tp_size)
        refused = (self.not_split or {}).get(tp_size)
        unproven = f"tp {tp_size}: nothing proven: {refused}"
        way = (self.ways or {}).get(tp_size)
        uneven = f"tp {tp_size}: not even, proven as the reference decoder splits it: {way}"
        return {
            "tp_size": tp_size,
            "files": self.files,
            "tensors": self.tensors,
            "compared": self.compared,
            "problems": [*self.problems, *(mine or ())],
            "tiled": mine == () and not self.problems,
            "notes": [*self.notes, *([unproven] if refused else []), *([uneven] if way else [])],
        }


def header_findings(
    directory: Path, config: Mapping[str, Any], tp_sizes: Sequence[int]
) -> Findings:
    """Hold a directory's safetensors headers against its config.

    Raises:
        PlanError: the config is malformed.
        SubjectError: no safetensors file is there.
        TPCheckError: a file is cut short or contradicts itself.
    """
    headers = read_headers(directory)
    parts = read_parts(config)
    decoder = next(name for name, facts in parts if facts.role == "text")
    named, rest = names_by_part(headers.tensors, [name for name, _ in parts], decoder)
    notes, problems = [], []
    proofs: list[Proof] = []
    for name, facts in parts:
        fields = part_fields(config, name)
        where = f"{name}: " if name else ""
        family = _family(facts)
        reason = _why_unknown(family, facts, fields)
        if family is None or reason is not None:
            notes.append(f"{where}{reason}")
            continue
        mine = named[name]
        expected = expected_tensors(facts, fields, family, mine.stored.keys())
        tied = bool(fields.get("tie_word_embeddings", family.tied))
        problems += _differences(expected, headers, mine, tied=tied)
        notes += [f"{where}{note}" for note in _notes(facts)]
        proofs.append(_split(expected, headers, mine, facts, tp_sizes))
    if rest:
        count = f"{len(rest)} tensors" if len(rest) > 1 else "1 tensor"
        notes.append(f"{count} belong to no part and are whole on every rank, the first {rest[0]}")
    whole = len(proofs) == len(parts)
    proof = _joined(proofs, tp_sizes, whole=whole)
    files, count_all = len(headers.files), len(headers.tensors)
    return Findings(files, count_all, bool(proofs), tuple(problems), tuple(notes), *proof)


Proof = tuple[dict[int, tuple[str, ...]], dict[int, str], dict[int, str]]
"""Degree → problems of its split; why it cannot be split; how it is split where it is not even."""


def _joined(proofs: Sequence[Proof], tp_sizes: Sequence[int], *, whole: bool) -> Proof:
    """Return the proof of all parts together: a degree is proven where every part is."""
    by_degree: dict[int, tuple[str, ...]] = {}
    not_split: dict[int, str] = {}
    ways: dict[int, str] = {}
    for degree in tp_sizes:
        found = [one[0].get(degree) for one in proofs]
        problems = tuple(problem for one in found for problem in one or ())
        if problems or (whole and None not in found):
            by_degree[degree] = problems
    for _, refused, uneven in proofs:
        not_split |= refused
        ways |= {degree: way for degree, way in uneven.items() if way}
    return by_degree, not_split, ways


def _family(facts: Facts) -> Family | None:
    table = FAMILIES if facts.role == "text" else TOWERS
    return table.get(facts.model_type or "")


def _notes(facts: Facts) -> list[str]:
    if facts.quant is None:
        return []
    method = facts.quant.method
    notes = []
    if facts.quant.desc_act:
        notes.append("desc_act=true: g_idx says which scales a rank needs, and no header holds it")
    return [
        *notes,
        f"{method}: scales are held to presence, shape and dtype; their values are in no header",
    ]


def _why_unknown(family: Family | None, facts: Facts, fields: Mapping[str, Any]) -> str | None:
    """Say why this part's tensors cannot be told from its config."""
    if family is None:
        known = ", ".join(FAMILIES if facts.role == "text" else TOWERS)
        return (
            f"model_type={brief(facts.model_type)} has no table of tensors, those that do: {known}"
        )
    if facts.quant is not None and storing(facts.quant) is None:
        return f"quant_method={brief(facts.quant.method)} at {facts.quant.bits} bits has no table"
    missing = missing_fields(facts, fields, family)
    if missing:
        return f"the config does not say {', '.join(missing)}"
    experts = len(sparse_layers(facts, fields)) * (facts.num_experts or 0)
    return f"{experts} experts in all are more than any model's" if experts > _MOST else None


def _differences(
    expected: Mapping[str, Expected], headers: Headers, names: PartNames, *, tied: bool
) -> list[str]:
    found: dict[str, list[str]] = {}
    for inner, one in expected.items():
        name = names.spelled(inner)
        header = headers.tensors.get(name)
        if header is None:
            if not one.optional:
                _add(found, name, f"is missing, but should be {_shown(one)}")
            continue
        wrong = _wrong(one, header)
        if wrong:
            _add(found, name, wrong)
    for inner, name in names.stored.items():
        own_copy = tied and name.endswith("lm_head.weight")
        if inner not in expected and not own_copy and not name.endswith(_DERIVED):
            shape = list(headers.tensors[name].shape)
            _add(found, name, f"shape={shape} is there, but config.json gives no use for it")
    return [_line(what, names) for what, names in found.items()]


def _shown(one: Expected) -> str:
    return "there" if one.any_shape else " or ".join(str(list(shape)) for shape in one.shapes)


def _wrong(one: Expected, header: Header) -> str | None:
    if not one.any_shape and header.shape not in one.shapes:
        return f"shape={list(header.shape)}, but should be {_shown(one)}"
    if (one.dtypes and header.dtype not in one.dtypes) or (
        not one.dtypes and not one.any_shape and header.dtype not in _FLOATS
    ):
        allowed = " or ".join(one.dtypes or _FLOATS)
        return f"dtype={header.dtype}, but should be {allowed}"
    return None


def _add(found: dict[str, list[str]], name: str, what: str) -> None:
    kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
    found.setdefault(f"{kind}\n{what}", []).append(name)


def _line(key: str, names: Sequence[str]) -> str:
    """Say `model.layers.*.x.weight (80 tensors, first in layer 0): what`."""
    kind, _, what = key.partition("\n")
    if len(names) == 1:
        return f"{names[0]}: {what}"
    return f"{kind} ({len(names)} tensors, the first {names[0]}): {what}"


def _split(
    expected: Mapping[str, Expected],
    headers: Headers,
    names: PartNames,
    facts: Facts,
    tp_sizes: Sequence[int],
) -> Proof:
    """Prove the tiling at each degree; every kind of tensor is judged once."""
    kinds: dict[tuple[str, Expected], list[str]] = {}
    for inner, one in expected.items():
        name = names.spelled(inner)
        header = headers.tensors.get(name)
        if header is not None and header.shape in one.shapes and not one.any_shape:
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            kinds.setdefault((kind, one.stored_as(header.shape)), []).append(name)
    by_degree: dict[int, tuple[str, ...]] = {}
    not_split: dict[int, str] = {}
    ways: dict[int, str] = {}
    spec = _spec(facts)
    grain = quant_grain(facts)
    for tp_size in tp_sizes:
        cuts = (
            spec
            if isinstance(spec, str)
            else cuts_at(spec, facts.intermediate_size, tp_size, grain)
        )
        if isinstance(cuts, str):
            not_split[tp_size] = cuts
            continue
        ways[tp_size] = cuts.way
        by_degree[tp_size] = tuple(
            _line(f"{kind}\n{problem} [tp {tp_size}]", names)
            for (kind, one), names in kinds.items()
            for problem in tiling_problems(one, one.logical, cuts.spans, tp_size)[:_SHOWN]
        )
    return by_degree, not_split, ways


def _spec(facts: Facts) -> ModelSpec | str:
    """Return the numbers that are split, as a spec; what else a spec says splits nothing."""
    kv = facts.num_attention_heads if facts.uses_mla else facts.num_key_value_heads
    fields: dict[str, Any] = {
        "vocab_size": facts.vocab_size or facts.hidden_size,
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size or facts.expert_width,
        "num_hidden_layers": 1,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": kv,
        "head_dim": facts.head_dim,
        "model_type": facts.model_type or "",
        "position": "learned",  # rope would ask for an even head_dim, which no split depends on
    }
    if facts.num_experts:
        fields |= {
            "num_experts": facts.num_experts,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": facts.expert_width,
            "shared_expert_intermediate_size": facts.shared_expert_intermediate_size or 0,
        }
    try:
        return ModelSpec.from_fields(fields)
    except PlanError as error:
        return str(error)
