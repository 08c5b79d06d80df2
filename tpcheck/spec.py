"""What is checked: a model in the words of its config.json, and one point of a run.

Requirement: everything before a weight moves (plans, strategies, case ids) works on these two
records alone, without torch and without tensors. Field names are Hugging Face's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import PlanError, TPCheckError
from tpcheck.json_reader import brief
from tpcheck.quantization import Quantization


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rope's frequencies are stretched: "linear", or by wavelength "llama3" or "yarn".

    `beta_fast`, `beta_slow` and `truncate` are yarn's, as is `attention_factor`, which multiplies
    cos and sin; 0 means "derive it from factor".
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3", "yarn"):
            raise PlanError(
                f"rope_scaling: rope_type={brief(self.rope_type)},"
                " but should be one of linear, llama3, yarn"
            )
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "truncate":
                _require_flag("rope_scaling: truncate", value)
            elif field.name != "attention_factor" or value != 0:
                _require_positive(f"rope_scaling: {field.name}", value)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise PlanError(
                    f"rope_scaling: {low}={getattr(self, low)}, but should be below"
                    f" {high}={getattr(self, high)}"
                )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> RopeScaling:
        """Make a scaling from a dict of its fields."""
        try:
            return cls(**fields)
        except TypeError as error:
            reason = str(error).removeprefix("RopeScaling.__init__() ")
            raise PlanError(f"rope_scaling: {reason}") from error


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder, as its config.json describes it.

    `head_dim` of 0 and `num_key_value_heads` of 0 mean "derive it", as HF does when the field is
    absent. `qk_norm`: "none", "per_head" (Qwen3) or "across_heads" (OLMo-2). `norm_type`: "rms" or
    "layer". `mlp`: "gated" (SwiGLU family) or "plain" (GPT-2, two linears). `position`: "rope" or
    "learned". `sliding_window` of 0 means full attention; else it holds in every layer, or in those
    that `layer_types` calls "sliding_attention" and not "full_attention" (one per layer; what is
    beyond `num_hidden_layers` is cut off). `attention_sinks`: a learned logit per query head takes
    part in the softmax and gives nothing. `swiglu_limit` above 0 makes the gated MLP gpt-oss's:
    clamped, and with `swiglu_alpha` inside the sigmoid.

    `num_experts` of 0 is a dense model; else every layer's MLP is a router over that many experts,
    `intermediate_size` is what `moe_intermediate_size` of 0 is derived from (Mixtral gives no
    other), `mlp_bias` gives biases to the routed experts only, and
    `shared_expert_intermediate_size` above 0 adds one expert for every token, behind a sigmoid gate
    (Qwen2-MoE). `router_scoring`: shares are a softmax over all experts of which the largest are
    taken ("softmax_topk"), or one over the largest logits only ("topk_softmax", gpt-oss).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    mlp: str = "gated"
    norm_type: str = "rms"
    norm_eps: float = 1e-6
    position: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: str = "none"
    tie_word_embeddings: bool = False
    sliding_window: int = 0
    layer_types: tuple[str, ...] = ()
    attention_sinks: bool = False
    swiglu_limit: float = 0.0
    swiglu_alpha: float = 1.702
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    router_bias: bool = False
    router_scoring: str = "softmax_topk"
    shared_expert_intermediate_size: int = 0
    quantization: Quantization | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.num_key_value_heads == 0:
            set_(self, "num_key_value_heads", self.num_attention_heads)
        self._require_values()
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise PlanError(
                    f"num_attention_heads={self.num_attention_heads}, but should divide"
                    f" hidden_size={self.hidden_size} when head_dim is not given"
                )
            set_(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise PlanError(
                f"num_key_value_heads={self.num_key_value_heads}, but should divide"
                f" num_attention_heads={self.num_attention_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise PlanError(f"head_dim={self.head_dim}, but should be even: rope turns pairs")
        if isinstance(self.rope_scaling, Mapping):
            set_(self, "rope_scaling", RopeScaling.from_fields(self.rope_scaling))
        if isinstance(self.quantization, Mapping):
            set_(self, "quantization", Quantization.from_fields(self.quantization))
        _require_layer_types(self)
        _require_swiglu(self)
        _require_experts(self)
        if self.num_experts and self.moe_intermediate_size == 0:
            set_(self, "moe_intermediate_size", self.intermediate_size)

    def _require_values(self) -> None:
        for name in (*_SIZES, *_OPTIONAL_SIZES):
            least = 1 if name in _SIZES else 0
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PlanError(
                    f"{name}={brief(value)}, but should be a whole number of at least {least}"
                )
        for name in ("norm_eps", "rope_theta", "swiglu_alpha"):
            _require_positive(name, getattr(self, name))
        for name in _FLAGS:
            _require_flag(name, getattr(self, name))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"{name}={brief(getattr(self, name))}, but should be one of"
                    f" {', '.join(allowed)}"
                )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """Make a spec from a dict of its fields; unknown names are an error that lists them."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise PlanError(f"spec has unknown fields {', '.join(unknown)}; known: {sorted(known)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise PlanError(f"spec: {str(error).removeprefix('ModelSpec.__init__() ')}") from error

    def window_of(self, layer: int) -> int:
        """Return how many positions a layer's queries see, their own included; 0 for all."""
        sliding = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else 0

    def to_fields(self) -> dict[str, Any]:
        """Return the fields as a plain dict, in order of declaration."""
        return dataclasses.asdict(self)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_EXPERT_SIZES = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
_OPTIONAL_SIZES = ("head_dim", "sliding_window", "num_experts", *_EXPERT_SIZES)
_FLAGS = (
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "lm_head_bias",
    "norm_topk_prob",
    "attention_sinks",
    "router_bias",
    "tie_word_embeddings",
)
_CHOICES = {
    "qk_norm": ("none", "per_head", "across_heads"),
    "norm_type": ("rms", "layer"),
    "mlp": ("gated", "plain"),
    "position": ("rope", "learned"),
    "hidden_act": ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    "router_scoring": ("softmax_topk", "topk_softmax"),
}
LAYER_TYPES = ("full_attention", "sliding_attention")


def _require_layer_types(spec: ModelSpec) -> None:
    """Make layer_types a tuple of one per layer; raise when they say something that cannot be."""
    types, layers = spec.layer_types, spec.num_hidden_layers
    if not isinstance(types, (list, tuple)) or any(one not in LAYER_TYPES for one in types):
        raise PlanError(
            f"layer_types={brief(types)}, but should be a list of {' and '.join(LAYER_TYPES)}"
        )
    if types and len(types) < layers:
        raise PlanError(
            f"layer_types={brief(list(types))}, but should name a kind for each of"
            f" num_hidden_layers={layers}"
        )
    if "sliding_attention" in types and not spec.sliding_window:
        raise PlanError("sliding_window=0, but should be given: layer_types has sliding_attention")
    object.__setattr__(spec, "layer_types", tuple(types[:layers]))


def _require_swiglu(spec: ModelSpec) -> None:
    """Raise when a clamp is asked for in an MLP that has none."""
    limit = spec.swiglu_limit
    if limit == 0 and not isinstance(limit, bool):
        return
    _require_positive("swiglu_limit", limit)
    for name, needed in (("mlp", "gated"), ("hidden_act", "silu")):
        if getattr(spec, name) != needed:
            raise PlanError(
                f"{name}={brief(getattr(spec, name))}, but should be {brief(needed)} where"
                f" swiglu_limit={limit}"
            )


def _require_experts(spec: ModelSpec) -> None:
    """Raise when the fields of a mixture of experts contradict each other."""
    chosen, experts = spec.num_experts_per_tok, spec.num_experts
    if experts == 0:
        for name in (*_EXPERT_SIZES, "norm_topk_prob", "router_bias"):
            if getattr(spec, name):
                raise PlanError(
                    f"{name}={brief(getattr(spec, name))}, but should be left out where"
                    f" num_experts=0:"
                    " a dense model has no experts"
                )
        return
    if not 1 <= chosen <= experts:
        raise PlanError(
            f"num_experts_per_tok={chosen}, but should be from 1 to num_experts={experts}"
        )
    if spec.mlp != "gated":
        raise PlanError(f"mlp={brief(spec.mlp)}, but should be 'gated' where num_experts={experts}")


def _require_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise PlanError(f"{name}={brief(value)}, but should be true or false")


def _require_positive(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):  # type: ignore[operator]
        raise PlanError(f"{name}={brief(value)}, but should be a positive number")


MAX_SEED = 2**63 - 1
"""torch.Generator takes signed 64 bits."""


@dataclass(frozen=True, slots=True)
class Case:
    """One point of a run: the inputs and weights of a subject, before any degree or dtype.

    `id` excludes tp_size and dtype: a verdict's key is (case id, tp_size, dtype). `spec` is what
    was generated for a subject that takes one; None for a subject that is one model.
    """

    seed: int
    batch: int
    seq_len: int
    spec: ModelSpec | None = None

    @property
    def id(self) -> str:
        """Return the stable name of this case, which `--case` takes: `s7-b2-t16`.

        A generated spec follows as JSON, without the fields that have their default:
        `s7-b2-t16+{"vocab_size":11,...}`.
        """
        name = f"s{self.seed}-b{self.batch}-t{self.seq_len}"
        if self.spec is None:
            return name
        return f"{name}+{json.dumps(_fields_set(self.spec), separators=(',', ':'))}"

    @classmethod
    def parse(cls, case_id: str) -> Case:
        """Return the case a name stands for.

        Raises:
            TPCheckError: the name is not of the form `s7-b2-t16` or `s7-b2-t16+{...}`, or names
                what cannot be run.
            PlanError: the fields after the + make no spec.
        """
        pattern = r"s(\d+)-b(\d+)-t(\d+)(?:\+(\{.*\}))?"
        match = isinstance(case_id, str) and re.fullmatch(pattern, case_id, re.DOTALL)
        if not match:
            raise TPCheckError(
                f"case={brief(case_id)}, but should look like s7-b2-t16 (seed, batch, length)"
            )
        seed, batch, seq_len = map(int, match.groups()[:3])
        if seed > MAX_SEED or not batch or not seq_len:
            raise TPCheckError(
                f"case={brief(case_id)}, but a seed should be at most {MAX_SEED},"
                " and batch and length at least 1"
            )
        if match[4] is None:
            return cls(seed, batch, seq_len)
        try:
            fields = json.loads(match[4])
        except ValueError as error:
            raise TPCheckError(f"case={brief(case_id)}: the spec is not JSON: {error}") from error
        return cls(seed, batch, seq_len, ModelSpec.from_fields(fields))


def _fields_set(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a spec that differ from their default."""
    values = spec.to_fields()
    return {
        field.name: values[field.name]
        for field in dataclasses.fields(spec)
        if values[field.name] != field.default
    }
