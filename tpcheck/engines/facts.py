"""What the rules of engines look at: the numbers of one decoder or tower, in one spelling.

Requirement: a rule reads a field or learns that it is not there, so that a whole config.json and a
fragment of one (a single layer's K and N, a vocabulary alone) are planned by the same rules. Facts
are frozen and hashable: a survey of 64 degrees is made once per engine and model.

[Scope] `tensor` limits a plan to one weight of the model, `stage` to what happens until then:
"create" when the layer is built, "load" also when weights arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """One logical part of a column-parallel weight: `units` of `width` rows, never cut inside."""

    units: int
    width: int

    @property
    def size(self) -> int:
        """Rows of the whole part."""
        return self.units * self.width

    def local(self, tp_size: int) -> int:
        """Rows on one rank; a part with fewer units than ranks gives one unit to each."""
        return max(1, self.units // tp_size) * self.width


class Linear(NamedTuple):
    """One weight: `rows` style splits `in_features`, `columns` style splits each of `parts`.

    `in_features` is None where the config does not say it. A weight of style "local" is given as
    one rank has it.
    """

    name: str
    style: str
    in_features: int | None
    parts: tuple[Part, ...]

    @property
    def out_features(self) -> int:
        """All output features, over the parts."""
        return sum(part.size for part in self.parts)

    def local_in(self, tp_size: int) -> int | None:
        """Input features on one rank."""
        if self.style != "rows" or self.in_features is None:
            return self.in_features
        return self.in_features // tp_size

    def local_out(self, tp_size: int) -> int:
        """Output features on one rank."""
        if self.style == "rows":
            return self.out_features
        return sum(part.local(tp_size) for part in self.parts)


class Quant(NamedTuple):
    """How weights are stored. `block` is (block_n, block_k); `forced` is a method given as a flag.

    `ignored` holds the names of modules that are not quantized.
    """

    method: str
    block: tuple[int, int] | None = None
    group_size: int | None = None
    bits: int = 4
    desc_act: bool = False
    forced: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """One decoder or tower. None means that the config does not say it.

    `role` is "text" or "tower". `intermediate_size` is a dense MLP's width and
    `moe_intermediate_size` an expert's; `uses_mla` says that keys and values are compressed, so
    that no rule about KV heads holds; `linear_num_key_heads` and the three beside it are those of
    layers with linear attention, and the three from `mamba_num_heads` on those of state-space
    layers (the first Mamba has a width and no heads). The fields from `ep_size` on are not a
    model's but a run's.
    """

    role: str = "text"
    model_type: str | None = None
    architecture: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    vocab_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    mamba_num_heads: int | None = None
    mamba_n_groups: int | None = None
    mamba_intermediate_size: int | None = None
    uses_mla: bool = False
    gated: bool = True
    tied: bool = False
    dtype: str | None = None
    quant: Quant | None = None
    linears: tuple[Linear, ...] = ()
    sharded_dim: int | None = None
    tensor: str | None = None
    stage: str = "run"
    ep_size: int = 1
    moe_dp_size: int = 1
    moe_backend: str | None = None
    linear_backend: str | None = None
    device: str = "cuda"
    compute_capability: str = "8.0"
    decode_context_parallel_size: int = 1
    memory: tuple[float, ...] | None = None
    tp_grain_size: int = 64
    make_vocab_size_divisible_by: int = 128
    kv_size_multiplier: int | None = None
    pad_alignment_size_per_rank: int = 1
    sequence_parallel: bool = False
    inference_layers: bool = False
    inference_v2: bool = False
    use_local_output: bool = True
    batch: int | None = None
    seq_len: int | None = None

    @property
    def block(self) -> tuple[int, int] | None:
        """The block of fp8 weights with a scale per block, (block_n, block_k)."""
        return self.quant.block if self.quant else None

    @property
    def method(self) -> str | None:
        """How weights are quantized."""
        return self.quant.method if self.quant else None

    @property
    def expert_width(self) -> int | None:
        """The width of experts, or of the MLP where a fragment does not tell them apart."""
        return self.moe_intermediate_size or self.intermediate_size

    def quantized(self, linear: Linear) -> bool:
        """Whether this weight is stored in the quantized form."""
        ignored = self.quant.ignored if self.quant else ()
        return not any(linear.name in name or name in linear.name for name in ignored)


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient rounded up."""
    return -(-number // divisor)


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-number // multiple) * multiple


def chunks(total: int, parts: int) -> list[int]:
    """Return the sizes torch.chunk gives: ceil-sized pieces, the last ones short or empty."""
    size = ceil_div(total, parts)
    whole, rest = divmod(total, size) if size else (0, 0)
    return ([size] * whole + [rest] + [0] * parts)[:parts]
