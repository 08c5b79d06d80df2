"""Subjects made of the reference decoder: `builtin:NAME[+FAULT]` and `ref:DIR`.

Requirement: a new user has something real to run before writing a line, and every fault of
`faults.py` can be typed on the command line. Importing this module loads no torch, so that
`tpcheck run --list` is instant.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tpcheck.errors import SubjectError
from tpcheck.faults import FAULTS, Fault
from tpcheck.faults.planting import planted_decoder
from tpcheck.quantization import Quantization
from tpcheck.spec import ModelSpec, RopeScaling
from tpcheck.subjects import DEFAULT_SEQ_LEN, Subject, SubjectOptions, SubjectRef

if TYPE_CHECKING:
    from tpcheck.groups.base import RecordedGroup, TPGroup

_LLAMA = ModelSpec(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

_UNQUANTIZED = "llama-small"
_SMALL = replace(_LLAMA, hidden_size=256, intermediate_size=256, head_dim=32)
_FP8 = Quantization("fp8", 32, 32, activations="group")
_INT8 = Quantization("int8", activations="token")
_FP8_KV = Quantization("fp8", kv_cache="head")

BUILTINS: dict[str, tuple[str, ModelSpec]] = {
    "llama-tiny": ("2 layers, 8 heads over 2 KV heads, SwiGLU, RMSNorm, vocab 131", _LLAMA),
    "qwen3-tiny": (
        "q/k norm per head, head_dim 16, 4 KV heads, tied embeddings",
        replace(
            _LLAMA,
            num_key_value_heads=4,
            head_dim=16,
            qk_norm="per_head",
            tie_word_embeddings=True,
            model_type="qwen3",
        ),
    ),
    "gpt2-tiny": (
        "LayerNorm, learned positions, GELU MLP, biases everywhere, tied embeddings",
        replace(
            _LLAMA,
            num_key_value_heads=8,
            mlp="plain",
            hidden_act="gelu_new",
            norm_type="layer",
            norm_eps=1e-5,
            position="learned",
            attention_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            model_type="gpt2",
        ),
    ),
    "olmo2-tiny": (
        "q/k norm across all heads, attention and MLP biases",
        replace(
            _LLAMA,
            qk_norm="across_heads",
            attention_bias=True,
            attention_out_bias=True,
            mlp_bias=True,
            model_type="olmo2",
        ),
    ),
    "mixtral-tiny": (
        "8 experts, 2 per token, renormalized; 48 wide each",
        replace(
            _LLAMA,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            model_type="mixtral",
        ),
    ),
    "qwen2-moe-tiny": (
        "8 experts, 2 per token, and a shared expert behind a sigmoid gate; q/k/v biases",
        replace(
            _LLAMA,
            attention_bias=True,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=96,
            model_type="qwen2_moe",
        ),
    ),
    "gpt-oss-tiny": (
        "attention sinks, window in every other layer, yarn, 8 experts with biases and a clamp",
        replace(
            _LLAMA,
            head_dim=16,
            norm_eps=1e-5,
            attention_bias=True,
            attention_out_bias=True,
            attention_sinks=True,
            sliding_window=5,
            layer_types=("sliding_attention", "full_attention"),
            rope_theta=150000.0,
            rope_scaling=RopeScaling(
                "yarn", 32.0, original_max_position_embeddings=16, truncate=False
            ),
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            mlp_bias=True,
            router_bias=True,
            router_scoring="topk_softmax",
            swiglu_limit=7.0,
            model_type="gpt_oss",
        ),
    ),
    _UNQUANTIZED: ("as llama-tiny, 256 wide: what the quantized ones are made of", _SMALL),
    **{
        f"{name}-small": (f"{_UNQUANTIZED} in {description}", replace(_SMALL, quantization=how))
        for name, description, how in (
            ("fp8", "e4m3, blocks of 32 x 32, activations in groups of 32", _FP8),
            ("int8", "int8, a scale per channel, activations per token", _INT8),
            ("gptq", "4 bits, groups of 32, act-order", Quantization("gptq", 32, desc_act=True)),
            ("awq", "4 bits, groups of 32, zero points", Quantization("awq", 32, symmetric=False)),
            ("mxfp4", "4-bit floats, blocks of 32", Quantization("mxfp4", 32)),
            ("nvfp4", "4-bit floats, blocks of 16 and a scale of them", Quantization("nvfp4", 16)),
            ("fp8-kv", "e4m3 per channel, KV cache in e4m3 with a scale per head", _FP8_KV),
        )
    },
}


def list_builtins() -> list[tuple[str, str]]:
    """Return (name, description) of every builtin subject, then of every fault that fits one."""
    subjects = [(name, description) for name, (description, _) in BUILTINS.items()]
    return subjects + [(f"llama-tiny+{name}", fault.description) for name, fault in FAULTS.items()]


def load_builtin(name: str) -> Subject:
    """Return `NAME` or `NAME+FAULT` as a subject.

    Raises:
        SubjectError: no such subject or fault; names those that there are.
    """
    base, _, fault_name = name.partition("+")
    if base not in BUILTINS:
        raise SubjectError(f"builtin:{name}: there is {', '.join(BUILTINS)}")
    spec = BUILTINS[base][1]
    fault = None
    if "+" in name:
        fault = FAULTS.get(fault_name)
        if fault is None:
            raise SubjectError(
                f"builtin:{name}: there is no fault {fault_name!r}; there is {', '.join(FAULTS)}"
            )
        spec = replace(spec, **fault.needs)
        if fault.caught_by == "plan":
            return _accepting(f"builtin:{name}", spec, fault)
    options = _options(spec)
    if spec.quantization is not None and fault is None:
        before = SubjectRef("builtin", _UNQUANTIZED, label=f"builtin:{_UNQUANTIZED}")
        options = replace(options, unquantized=before)
    return Subject(f"builtin:{name}", partial(_build_generated, spec, fault), options)


def load_directory(directory: str) -> Subject:
    """Return a local Hugging Face directory, run by the reference decoder.

    Raises:
        SubjectError: the directory, its config.json or its safetensors are missing.
        PlanError: the config is malformed, or says something the reference cannot do.
    """
    from tpcheck.reference.checkpoint import read_spec

    spec = read_spec(directory)
    build = partial(_build_checkpoint, directory)
    return Subject(f"ref:{directory}", build, _options(spec))


def _options(spec: ModelSpec) -> SubjectOptions:
    longest = min(DEFAULT_SEQ_LEN, spec.max_position_embeddings)
    return SubjectOptions(vocab_size=spec.vocab_size, seq_len=longest, spec=spec)


def _build_generated(spec: ModelSpec, fault: Fault | None, tp: TPGroup) -> Any:
    return planted_decoder(spec, fault, tp)


def _accepting(name: str, spec: ModelSpec, fault: Fault) -> Subject:
    """Return a subject whose spec counts as generated: only then must it refuse the degree."""
    from hypothesis import strategies

    options = replace(_options(spec), spec=None, specs=strategies.just(spec))
    return Subject(name, lambda tp, generated: planted_decoder(generated, fault, tp), options)


def _build_checkpoint(directory: str, tp: RecordedGroup) -> Any:
    from tpcheck.reference.checkpoint import load_decoder

    return load_decoder(directory, tp)
