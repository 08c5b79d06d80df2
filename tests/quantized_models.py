"""Small quantized model directories, as the formats' tools write them.

fp8 blocks by transformers' own quantizer, compressed-tensors' formats by its own compressors. GPTQ
and AWQ by tpcheck.reference.quantizing in the published layout: GPTQModel needs a newer torch with
CUDA, AutoAWQ needs Triton. So does transformers to make gpt-oss's MXFP4, which is ours too.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.models import load_model, make_model
from tpcheck.quantization import Quantization
from tpcheck.reference.quantizing import quantize

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 12}
NARROW: dict[str, Any] = {**HEADS, "hidden_size": 96, "intermediate_size": 384, "head_dim": 32}
"""Groups of 32 stay whole at TP 2, 3 and 4: 12 heads, and 384 features."""

WIDE: dict[str, Any] = {
    **HEADS,
    "hidden_size": 256,
    "intermediate_size": 1536,
    "head_dim": 128,
    "num_hidden_layers": 1,
}
"""Blocks of 128 stay whole at TP 2, 3 and 4."""

LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("w1", "w2", "w3"),
)


def rewrite(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Give a model directory these tensors and this quantization_config."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def fp8_block(directory: Path) -> Path:
    """Make a Qwen3 model with fp8 blocks of 128, as DeepSeek and Qwen publish them."""
    return _fp8(directory, 128, name="qwen3", **WIDE)


def fp8_experts(directory: Path) -> Path:
    """Make a Qwen3-MoE model with fp8 blocks, small ones that TP 2, 3 and 4 keep whole."""
    sizes = {"num_experts": 3, "moe_intermediate_size": 384, "num_experts_per_tok": 2}
    fields = {**NARROW, "model_type": "qwen3_moe", **sizes, "num_hidden_layers": 1}
    return _fp8(directory, 32, name="llama", **fields)


def _fp8(directory: Path, block: int, **fields: Any) -> Path:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    if (directory / "config.json").exists():
        return directory
    left = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm"]
    config = FineGrainedFP8Config(weight_block_size=(block, block), modules_to_not_convert=left)
    convert = Fp8Quantize(FineGrainedFP8HfQuantizer(config)).convert
    make_model(directory, **fields)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        linear = any(f".{one}.weight" in name for one in LINEARS)
        tensors |= convert({name: tensor}) if linear else {name: tensor}
    return rewrite(directory, {**config.to_dict(), "quant_method": "fp8"}, tensors)


def by_compressed_tensors(
    directory: Path,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    **fields: Any,
) -> Path:
    """Make a Llama model and compress it; scales are of the largest magnitudes."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    if (directory / "config.json").exists():
        return directory
    dense = directory.with_name(f"{directory.name}_dense")
    make_model(dense, "llama", **{**NARROW, **fields})
    model = load_model(dense, torch.float32)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=list(ignore),
        quantization_status=QuantizationStatus.FROZEN,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_quantization_config(model, config)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                _set_scales(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(directory)
        compressor.update_config(str(directory))
    return directory


def _set_scales(module: Any) -> None:
    """Give a linear the scales and zero points that compressed-tensors makes of its weight."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments, weight = module.quantization_scheme.weights, module.weight.detach()
    rows, columns = weight.shape
    match arguments.strategy:
        case "tensor":
            blocks = weight.reshape(1, rows, 1, columns)
        case "block":
            height, width = arguments.block_structure
            blocks = weight.reshape(rows // height, height, columns // width, width)
        case _:
            width = arguments.group_size or columns
            blocks = weight.reshape(rows, 1, columns // width, width)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    whole = None
    if arguments.strategy == "tensor_group":
        whole = generate_gparam(weight.amin(), weight.amax())
        module.weight_global_scale.data = whole
    scale, zero = calculate_qparams(low, high, arguments, global_scale=whole)
    held = module.weight_scale
    held.data = scale.reshape(held.shape).to(held.dtype)
    if not arguments.symmetric:
        module.weight_zero_point.data = zero.reshape(held.shape).to(torch.int8)


def by_us(
    directory: Path,
    quantization: Quantization,
    config: dict[str, Any],
    name: str = "llama",
    **fields: Any,
) -> Path:
    """Make a model and quantize its linear layers by tpcheck's own quantizer."""
    if (directory / "config.json").exists():
        return directory
    make_model(directory, name, **{**NARROW, **fields})
    tensors: dict[str, torch.Tensor] = {}
    for full, tensor in load_file(directory / "model.safetensors").items():
        module = full.removesuffix(".weight")
        if full.endswith(".weight") and module.rpartition(".")[2] in LINEARS:
            parts = quantize(tensor, quantization)
            tensors |= {f"{module}.{suffix}": part for suffix, part in parts.items()}
        else:
            tensors[full] = tensor
    return rewrite(directory, config, tensors)


def gpt_oss(directory: Path) -> Path:
    """Make a gpt-oss model whose experts are MXFP4, in the blocks that OpenAI publishes."""
    if (directory / "config.json").exists():
        return directory
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
    make_model(directory, "llama", **{**NARROW, "model_type": "gpt_oss", **experts})
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        made = [
            quantize(one.T.contiguous(), Quantization("mxfp4", group_size=32)) for one in tensor
        ]
        codes = torch.stack([parts["weight_packed"] for parts in made])
        tensors[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = torch.stack([parts["weight_scale"] for parts in made])
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    return rewrite(directory, {"quant_method": "mxfp4", "modules_to_not_convert": left}, tensors)


def gptq_weight(parts: dict[str, torch.Tensor], bits: int, *, v2: bool) -> torch.Tensor:
    """Return the weight [N, K] of GPTQ's tensors, element by element as its paper's code says."""
    words, zeros, scales, groups = (
        parts[name].numpy().astype(np.int64) if name != "scales" else parts[name].double().numpy()
        for name in ("qweight", "qzeros", "scales", "g_idx")
    )
    count = 32 // bits
    k, n = np.indices((len(groups), words.shape[1]))
    code = words[k // count, n] >> bits * (k % count) & 2**bits - 1
    zero = (zeros[groups[k], n // count] >> bits * (n % count) & 2**bits - 1) + (0 if v2 else 1)
    return torch.from_numpy((code - zero) * scales[groups[k], n]).T


def awq_weight(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight [N, K] of AWQ's tensors: output n is nibble 0 4 1 5 2 6 3 7 of a word."""
    words, zeros = (parts[name].numpy().astype(np.int64) for name in ("qweight", "qzeros"))
    scales = parts["scales"].double().numpy()
    k, n = np.indices((len(words), scales.shape[1]))
    shift = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])[n % 8]
    group = k // (len(words) // len(scales))
    code, zero = words[k, n // 8] >> shift & 15, zeros[group, n // 8] >> shift & 15
    return torch.from_numpy((code - zero) * scales[group, n]).T
