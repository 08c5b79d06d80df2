"""What is checked: a model in the words of its config.json, and one point of a run.

Requirement: everything before a weight moves (plans, strategies, case ids) works on these two
records alone, without torch and without tensors. Field names are Hugging Face's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tpcheck.errors import PlanError, TPCheckError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder, as its config.json describes it.

    `head_dim` of 0 and `num_key_value_heads` of 0 mean "derive it", as HF does when the field is
    absent. `qk_norm`: "none", "per_head" (Qwen3) or "across_heads" (OLMo-2). `norm_type`: "rms" or
    "layer". `mlp`: "gated" (SwiGLU family) or "plain" (GPT-2, two linears). `position`: "rope" or
    "learned".
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
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    qk_norm: str = "none"
    tie_word_embeddings: bool = False
    sliding_window: int = 0
    model_type: str = "llama"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.num_key_value_heads == 0:
            set_(self, "num_key_value_heads", self.num_attention_heads)
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"{name}={value!r}, but should be a whole number of at least 1")
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
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"{name}={getattr(self, name)!r}, but should be one of {', '.join(allowed)}"
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
_CHOICES = {
    "qk_norm": ("none", "per_head", "across_heads"),
    "norm_type": ("rms", "layer"),
    "mlp": ("gated", "plain"),
    "position": ("rope", "learned"),
    "hidden_act": ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One point of a run: the inputs and weights of a subject, before any degree or dtype.

    `id` excludes tp_size and dtype: a verdict's key is (case id, tp_size, dtype).
    """

    seed: int
    batch: int
    seq_len: int

    @property
    def id(self) -> str:
        """Return the stable name of this case, which `--case` takes: `s7-b2-t16`."""
        return f"s{self.seed}-b{self.batch}-t{self.seq_len}"

    @classmethod
    def parse(cls, case_id: str) -> Case:
        """Return the case a name stands for.

        Raises:
            TPCheckError: the name is not of the form `s7-b2-t16`.
        """
        match = re.fullmatch(r"s(\d+)-b(\d+)-t(\d+)", case_id)
        if match is None:
            raise TPCheckError(f"case={case_id!r}, but should look like s7-b2-t16 (seed, batch, length)")
        seed, batch, seq_len = map(int, match.groups())
        return cls(seed, batch, seq_len)
