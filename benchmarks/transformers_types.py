"""Every causal language model of transformers that has a tensor-parallel plan, held to its TP=1.

    python benchmarks/transformers_types.py --json benchmarks/results/transformers_types.json

For each model type a small model is made of its own config class, with weights from a seed and no
bias zero and no norm one, saved as a directory and run by `tpcheck run hf:DIR --tp 2,4` over Gloo.
What is not PASS is either a false alarm of tpcheck's or a bug of transformers'; the file has the
reasons. Types of which no small model can be made so are listed with what was said.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tpcheck import environment

_OF_SIZE: dict[int, str] = {
    0: "pad_token_id num_kv_shared_layers",
    1: "bos_token_id n_shared_experts first_k_dense_replace n_group topk_group",
    2: (
        "num_hidden_layers eos_token_id num_experts_per_tok moe_topk moe_k num_layers"
        " index_n_heads mamba_n_groups"
    ),
    4: (
        "num_attention_heads num_key_value_heads num_experts num_local_experts"
        " n_routed_experts moe_num_experts linear_num_value_heads linear_num_key_heads"
        " mamba_n_heads"
    ),
    16: (
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim"
        " linear_key_head_dim linear_value_head_dim mamba_d_state"
        " hidden_size_per_layer_input"
    ),
    32: (
        "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size"
        " q_lora_rank kv_lora_rank mamba_d_head"
    ),
    64: "hidden_size sliding_window shared_intermediate_size index_topk",
    128: (
        "intermediate_size max_position_embeddings ffn_hidden_size"
        " dense_intermediate_size intermediate_size_mlp"
    ),
    256: "vocab_size vocab_size_per_layer_input",
}
SIZES = {name: size for size, names in _OF_SIZE.items() for name in names.split()}
"""Fields of all families; a config takes those it has."""

MOST_PARAMETERS, MEMORY = 30_000_000, 12 << 30


def planned_types() -> list[str]:
    """Return the causal-LM types whose config has a plan."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    configs = {kind: CONFIG_MAPPING[kind] for kind in NAMES if kind in CONFIG_MAPPING}
    return sorted(kind for kind, made in configs.items() if getattr(made, "base_model_tp_plan", 0))


def make(kind: str, directory: str) -> None:
    """Save the first small model of a type that runs; raise what the first to fail said."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[kind]
    default = made()
    fields = {name: value for name, value in SIZES.items() if name in default.to_dict()}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))[:2]
    said: Exception | None = None
    for more in ({}, {"num_hidden_layers": 4}, {"layer_types": kinds}):
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(made(**{**fields, **more}))
            if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
                raise ValueError(f"{kind}: more than {MOST_PARAMETERS} parameters")
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn_like(parameter, dtype=torch.float32)
                    new = parameter + 0.3 * noise if parameter.ndim == 1 else 0.08 * noise
                    parameter.copy_(new)
                model = model.to(torch.bfloat16).eval()
                model(torch.randint(3, 250, (2, 5)), use_cache=False)
            model.save_pretrained(directory)
            return
        except Exception as error:  # whatever a model's code makes of a small config
            said = said or error
    assert said is not None
    raise said


def child(arguments: list[str]) -> tuple[int, str]:
    """Return the exit status of this Python with arguments, and the end of what it said."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return done.returncode, lines[-1][:300] if lines else ""


def judged(kind: str, folder: str, tp: str) -> dict[str, Any]:
    """Return the outcome of one type and, where it is not PASS, why."""
    directory, report = f"{folder}/{kind}", f"{folder}/{kind}.json"
    status, said = child([__file__, "--make", kind, directory])
    if status:
        return {"outcome": "not made", "reason": said}
    command = ["-m", "tpcheck", "run", f"hf:{directory}", "--tp", tp, "--json", report, "--quiet"]
    status, said = child(command)
    if not os.path.exists(report):
        return {"outcome": "refused", "reason": said.replace(f"{folder}/", "")}
    read = json.loads(Path(report).read_text())
    verdicts = read["verdicts"]
    found: dict[str, Any] = {
        "outcome": read["outcome"],
        "verdicts": {str(one["tp_size"]): one["outcome"] for one in verdicts},
        "structural": {str(v["tp_size"]): _numbers(v["checks"]["structural"]) for v in verdicts},
        "drift_ratio": {str(v["tp_size"]): v["checks"]["drift"].get("ratio") for v in verdicts},
    }
    if notes := read.get("notes"):
        found["notes"] = [note for note in notes if "shards no decoder layer" in note]
    if read["outcome"] != "PASS":
        found["reasons"] = verdicts[0]["reasons"][:2]
        found["first_divergence"] = verdicts[0]["first_divergence"]
    return found


def _numbers(check: dict[str, Any]) -> list[float | None]:
    return [check.get("relative_rms"), check.get("limit")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tp", default="2,4")
    parser.add_argument("--types", nargs="*", help="these only")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.make:
        make(*options.make)
        return
    types = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types or planned_types():
            types[kind] = judged(kind, folder, options.tp)
            print(kind, types[kind]["outcome"], flush=True)
    counts = Counter(found["outcome"] for found in types.values())
    result = {
        "command": f"python benchmarks/transformers_types.py --tp {options.tp}",
        "outcomes": dict(counts),
        "types": types,
        "environment": environment.collect(),
    }
    print(json.dumps(result["outcomes"]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
