"""Make a small real model directory: 8 layers, GQA, bfloat16, random weights from a seed.

    python examples/make_model.py model

Needs `pip install 'tpcheck[hf]'`. Norm weights are randomized too: a zero bias and a norm
weight of ones hide the bugs that tpcheck looks for.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(directory: str) -> None:
    """Write config.json and model.safetensors into `directory`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            assert parameter.isfinite().all(), name
    model.to(torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1])
