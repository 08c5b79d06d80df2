"""What one rank holds of a model at a degree: bytes of weights, and of the KV cache. Torch-free.

Requirement: whether a degree fits a device is known before the model is downloaded, from the same
config that says whether it is legal. Quantized weights count with their scales and zero points;
copies (KV heads, routers, norms) count on every rank; the fullest rank is the one that counts.
What the config does not say makes a number unknown, never a guess, and so do layers of a kind that
is not counted here. Biases, norms and convolutions are in `engines.extras`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from tpcheck.engines.extras import UNCOUNTED, Vector, joining, vectors
from tpcheck.engines.facts import Facts, Quant, ceil_div
from tpcheck.engines.parts import read_parts
from tpcheck.engines.stored_bytes import DTYPE_BYTES, dtype_bytes, scale_bytes, stored_bits
from tpcheck.errors import PlanError
from tpcheck.json_reader import brief

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What the KV cache has to hold; `kv_dtype` of None is the model's own dtype."""

    seq_len: int | None = None
    batch: int = 1
    kv_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What the fullest rank holds, in bytes; None where `missing` fields would be needed.

    `padding` is the share of weights that are only there to make numbers divide: 0.02 means that
    all ranks together hold 2 % more elements than the model has. It is None where an engine pads
    in a way whose size is not known.
    """

    weight_bytes: int | None
    kv_cache_bytes: int | None
    padding: float | None
    missing: tuple[str, ...] = ()


class _Sides(NamedTuple):
    """One side of a weight: `units` of `width`, split over ranks or whole on each.

    `padded` is how many units all ranks hold together where an engine says so.
    """

    units: int
    width: int = 1
    split: bool = False
    padded: int = 0
    copied: bool = False

    @property
    def size(self) -> int:
        return self.units * self.width

    def local(self, tp_size: int) -> int:
        if not self.split:
            return self.size
        held = self.padded or self.units
        return max(1, ceil_div(held, tp_size)) * self.width

    def pads(self) -> int:
        return max(0, self.padded - self.units) * self.width if not self.copied else 0


class _Weight(NamedTuple):
    """`times` equal matrices [out, in]; `name` says whether a quantization leaves them out."""

    name: str
    out: _Sides
    into: _Sides
    times: int = 1
    linear: bool = True


def rank_memory(
    config: Config,
    tp_size: int,
    request: Request = Request(),
    *,
    sizes: Mapping[str, Any] | None = None,
    outcome: str = "ok",
    splits_towers: bool = True,
) -> RankMemory:
    """Return what the fullest rank holds of a model.

    Args:
        config: the fields of a config.json.
        request: what the KV cache has to hold; without a length its size is None.
        sizes: what an engine's plan says about padded heads and vocabulary.
        outcome: the engine's; "pad" means that widths are padded and not uneven.
        splits_towers: whether vision and audio towers are split too.

    Raises:
        PlanError: a field is malformed; names it and its value.
    """
    weights = padded = real = 0
    missing: list[str] = []
    cache: int | None = 0
    parts = read_parts(config)
    for name, facts in parts:
        fields = _fields(config, name)
        own = (sizes or {}).get(name, {}) if len(parts) > 1 else (sizes or {})
        lacking = _lacking(facts, fields)
        if lacking:
            missing += [f"{name}.{field}" if name else field for field in lacking]
            continue
        ranks = tp_size if facts.role == "text" or splits_towers else 1
        ranks = 1 if own.get("whole") else ranks
        for one in _weights(facts, fields, ranks, own, pads_widths=outcome == "pad"):
            weights += _weight_bytes(one, facts, ranks)
            real += one.out.size * one.into.size * one.times
            extra = one.out.pads() * one.into.size + one.into.pads() * one.out.size
            padded += extra * one.times
        small = [_vector_sizes(one, facts, ranks, own) for one in _vectors(facts, fields)]
        weights += sum(held for held, _ in small) * dtype_bytes(facts.dtype)
        real += sum(whole for _, whole in small)
        if facts.role == "text":
            cache = _cache_bytes(facts, fields, ranks, request, own)
    if missing:
        return RankMemory(None, None, None, tuple(missing))
    joined = _joined(config, parts)
    weights += joined
    share = float(Fraction(padded, real)) if real else None
    seen = None if outcome == "pad" and not padded else share
    return RankMemory(weights, cache, seen)


def _joined(config: Config, parts: Sequence[tuple[str, Facts]]) -> int:
    """Return the bytes of what joins a tower and its decoder."""
    towers = [facts for _, facts in parts if facts.role == "tower"]
    text = next(facts for _, facts in parts if facts.role == "text")
    return sum(
        joining(config, tower.hidden_size or 0, text.hidden_size or 0) for tower in towers
    ) * dtype_bytes(text.dtype)


def _fields(config: Config, name: str) -> Config:
    for key in filter(None, name.split(".")):
        config = config[key]
    return config


def _lacking(facts: Facts, fields: Config) -> list[str]:
    """Return the fields without which bytes would be a guess."""
    needed = ["hidden_size", "num_attention_heads", "head_dim"]
    needed += ["vocab_size"] if facts.role == "text" else []
    lacking = [name for name in needed if getattr(facts, name) is None]
    if _layers(facts, fields) is None:
        lacking.append("num_hidden_layers")
    if facts.intermediate_size is None and facts.moe_intermediate_size is None:
        lacking.append("intermediate_size")
    if facts.model_type in UNCOUNTED:
        lacking.append(f"the layers of model_type={brief(facts.model_type)}")
    if facts.quant is not None and stored_bits(facts.quant) is None:
        lacking.append(f"bytes of quant_method={brief(facts.quant.method)}")
    return lacking


def _layers(facts: Facts, fields: Config) -> int | None:
    depth = fields.get("depth")  # as Qwen's vision towers spell it
    layers = facts.num_hidden_layers
    if layers is None and isinstance(depth, int) and not isinstance(depth, bool) and depth > 0:
        layers = depth
    if layers is not None and layers > _MOST_LAYERS:
        raise PlanError(f"config: num_hidden_layers={layers}, but should be at most {_MOST_LAYERS}")
    return layers


_MOST_LAYERS = 10_000
"""Layers are counted one by one, so a number that is no model's must not be."""


def _number(fields: Config, name: str) -> int:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def sparse_layers(facts: Facts, fields: Config) -> tuple[int, ...]:
    """Return the layers whose MLP is a mixture of experts."""
    layers = _layers(facts, fields) or 0
    if not facts.num_experts:
        return ()
    first = _number(fields, "first_k_dense_replace") or _number(fields, "moe_layer_start_index")
    spelled = ("decoder_sparse_step", "moe_layer_freq", "moe_layer_interval")
    every = next(filter(None, (_number(fields, name) for name in spelled)), 1)
    listed = fields.get("mlp_only_layers")
    dense = listed if isinstance(listed, (list, tuple)) else ()
    shift = 1 if any(fields.get(name) for name in spelled if name != "moe_layer_freq") else 0
    return tuple(
        layer
        for layer in range(layers)
        if layer >= first and layer not in dense and (layer + shift) % every == 0
    )


def _weights(
    facts: Facts, fields: Config, tp_size: int, sizes: Mapping[str, Any], *, pads_widths: bool
) -> Iterator[_Weight]:
    """Yield the weights of one part."""
    hidden = _Sides(_known(facts.hidden_size))
    layers = _layers(facts, fields) or 0
    yield from _attention(facts, fields, hidden, layers, tp_size, sizes)
    sparse = len(sparse_layers(facts, fields))
    gates = 2 if facts.gated else 1
    held = _held_widths(sizes, tp_size)
    if facts.intermediate_size and layers > sparse:
        width = _width(facts, "intermediate_size", tp_size, held, pads=pads_widths)
        yield _Weight("mlp.gate_up_proj", width, hidden, gates * (layers - sparse))
        yield _Weight("mlp.down_proj", hidden, width, layers - sparse)
    if sparse:
        experts = _known(facts.num_experts)
        name = "moe_intermediate_size" if facts.moe_intermediate_size else "intermediate_size"
        width = _width(facts, name, tp_size, held, pads=pads_widths)
        yield _Weight("mlp.experts.gate_up_proj", width, hidden, gates * experts * sparse)
        yield _Weight("mlp.experts.down_proj", hidden, width, experts * sparse)
        yield _Weight("mlp.gate", _Sides(experts), hidden, sparse, linear=False)
        if facts.shared_expert_intermediate_size:
            width = _width(facts, _SHARED, tp_size, held, pads=pads_widths)
            yield _Weight("mlp.shared_expert.gate_up_proj", width, hidden, gates * sparse)
            yield _Weight("mlp.shared_expert.down_proj", hidden, width, sparse)
    if facts.role == "text":
        yield from _vocabulary(facts, fields, hidden, sizes)


def _vectors(facts: Facts, fields: Config) -> Iterator[Vector]:
    layers = _layers(facts, fields) or 0
    return vectors(facts, fields, layers, len(sparse_layers(facts, fields)))


def _vector_sizes(
    one: Vector, facts: Facts, tp_size: int, sizes: Mapping[str, Any]
) -> tuple[int, int]:
    """Return what the fullest rank holds of a vector, and what the model has."""
    units = {
        "query": facts.num_attention_heads,
        "kv": facts.num_key_value_heads,
        "intermediate": facts.intermediate_size,
        "moe_intermediate": facts.expert_width,
        "vocab": facts.vocab_size,
    }.get(one.split)
    if not units:
        return one.elements, one.elements
    padded = {
        "query": _said(sizes, "attention", "heads") or _said(sizes, "heads", "padded_heads"),
        "kv": _said(sizes, "attention", "kv_heads"),
        "vocab": _said(sizes, "vocab", "padded"),
    }
    side = _Sides(units, one.elements // units, split=True, padded=padded.get(one.split, 0))
    return side.local(tp_size), one.elements


def _vocabulary(
    facts: Facts, fields: Config, hidden: _Sides, sizes: Mapping[str, Any]
) -> Iterator[_Weight]:
    padded = _said(sizes, "vocab", "padded")
    rows = _Sides(_known(facts.vocab_size), split=True, padded=padded)
    yield _Weight("embed_tokens", rows, hidden, linear=False)
    tied = fields.get("tie_word_embeddings", facts.model_type in _TIED_BY_DEFAULT)
    if not tied:
        yield _Weight("lm_head", rows, hidden, linear=False)
    positions = _number(fields, _LEARNED_POSITIONS.get(facts.model_type or "", ""))
    if positions:
        # OPT keeps two rows before the first position
        more = 2 * (facts.model_type == "opt")
        yield _Weight("embed_positions", _Sides(positions + more), hidden, linear=False)


_TIED_BY_DEFAULT = frozenset(
    "gpt2 opt gemma gemma2 gemma3 gemma3_text falcon bloom gpt_bigcode mpt starcoder2".split()
)
"""Where Hugging Face's config class ties the head to the embedding unless told otherwise."""

_LEARNED_POSITIONS = {
    "gpt2": "n_positions",
    "gpt_bigcode": "n_positions",
    "opt": "max_position_embeddings",
}


def _attention(
    facts: Facts,
    fields: Config,
    hidden: _Sides,
    layers: int,
    tp_size: int,
    sizes: Mapping[str, Any],
) -> Iterator[_Weight]:
    heads, head_dim = _known(facts.num_attention_heads), _known(facts.head_dim)
    values = facts.v_head_dim or head_dim
    padded = _said(sizes, "attention", "heads") or _said(sizes, "heads", "padded_heads")
    split = not sizes.get("whole_attention")
    query = _Sides(heads, head_dim, split=split, padded=padded)
    out = query._replace(width=values)
    yield _Weight("self_attn.o_proj", hidden, out, layers)
    if not facts.uses_mla:
        held = _said(sizes, "attention", "kv_heads")
        keys = _Sides(
            facts.num_key_value_heads or heads, head_dim, split=split, padded=held, copied=True
        )
        yield _Weight("self_attn.q_proj", query, hidden, layers)
        yield _Weight("self_attn.k_proj", keys, hidden, layers)
        yield _Weight("self_attn.v_proj", keys._replace(width=values), hidden, layers)
        return
    latent = _number(fields, "kv_lora_rank")
    narrow = _Sides(_number(fields, "q_lora_rank"))
    if narrow.size:
        yield _Weight("self_attn.q_a_proj", narrow, hidden, layers)
    yield _Weight("self_attn.q_b_proj", query, narrow if narrow.size else hidden, layers)
    rope = _Sides(latent + _number(fields, "qk_rope_head_dim"))
    yield _Weight("self_attn.kv_a_proj_with_mqa", rope, hidden, layers)
    expanded = query._replace(width=_number(fields, "qk_nope_head_dim") + values)
    yield _Weight("self_attn.kv_b_proj", expanded, _Sides(latent), layers)


_SHARED = "shared_expert_intermediate_size"


def _held_widths(sizes: Mapping[str, Any], tp_size: int) -> dict[str, int]:
    """Return field → how wide all ranks hold it together, where an engine's plan says that."""
    named = sizes.get("widths")
    held = dict(named) if isinstance(named, Mapping) else {}
    for name in ("per_rank_size", "padded_experts", "padded_ispp"):
        local = sizes.get(name)
        if isinstance(local, int) and (name != "padded_ispp" or sizes.get("pad_ok")):
            held["moe_intermediate_size"] = local * tp_size
    return held


def _width(facts: Facts, name: str, tp_size: int, held: Mapping[str, int], *, pads: bool) -> _Sides:
    size = _known(getattr(facts, name))
    even = ceil_div(size, tp_size) * tp_size if pads else 0
    return _Sides(size, split=True, padded=held.get(name, even))


def _known(value: int | None) -> int:
    assert value is not None  # `_lacking` has asked
    return value


def _said(sizes: Mapping[str, Any], area: str, name: str) -> int:
    found = sizes.get(area)
    value = found.get(name) if isinstance(found, Mapping) else None
    return value if isinstance(value, int) else 0


# -- bytes


def _weight_bytes(weight: _Weight, facts: Facts, tp_size: int) -> int:
    out, into = weight.out.local(tp_size), weight.into.local(tp_size)
    quant = facts.quant
    if quant is None or not weight.linear or _is_left_out(weight.name, quant):
        return out * into * weight.times * dtype_bytes(facts.dtype)
    bits = stored_bits(quant)
    assert bits is not None  # `_lacking` has asked
    return (ceil_div(out * into * bits, 8) + scale_bytes(quant, out, into)) * weight.times


def _is_left_out(name: str, quant: Quant) -> bool:
    if quant.method == "mxfp4" and not name.startswith("mlp.experts"):
        return True  # a checkpoint's MXFP4 is its experts'
    return any(name in one or one in name for one in quant.ignored)


_WITHOUT_CACHE = ("linear_attention", "mamba", "recurrent", "conv")


def _cache_bytes(
    facts: Facts, fields: Config, tp_size: int, request: Request, sizes: Mapping[str, Any]
) -> int | None:
    """Return the cache's bytes; layers with a window count in full, as the most they can need."""
    if request.seq_len is None:
        return None
    types = fields.get("layer_types")
    kinds = types if isinstance(types, (list, tuple)) else ()
    layers = (_layers(facts, fields) or 0) - sum(kind in _WITHOUT_CACHE for kind in kinds)
    if facts.uses_mla:
        per_token = _number(fields, "kv_lora_rank") + _number(fields, "qk_rope_head_dim")
    else:
        heads = facts.num_key_value_heads or _known(facts.num_attention_heads)
        held = _Sides(heads, split=True, padded=_said(sizes, "attention", "kv_heads"))
        wide = _known(facts.head_dim) + (facts.v_head_dim or _known(facts.head_dim))
        per_token = held.local(tp_size) * wide
    tokens = request.seq_len * request.batch
    return layers * per_token * tokens * dtype_bytes(request.kv_dtype or facts.dtype)


__all__ = ["DTYPE_BYTES", "RankMemory", "Request", "rank_memory", "sparse_layers"]
