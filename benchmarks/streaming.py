"""Memory and time of a reference that is streamed layer by layer, beside one that holds all.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json

Every run is a process of its own under `/usr/bin/time -v` (Linux counts a parent's memory into its
child's peak, so this one loads no torch). Checkpoints are made of seeded bfloat16 values, shard by
shard, and deleted at the end. `--sizes quick` is done in seconds. `streamed` and `whole` of a size
and dtype were run in turn, and the ratio is of their shortest times; `same_bits` says that their
logits have one digest. The 4 GiB model is held whole in bfloat16 only: in float64 it is 16 GiB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "quick": {"hidden": 256, "intermediate": 1024, "layers": 8, "heads": 4, "vocab": 9000},
    "0.7GB": {"hidden": 1024, "intermediate": 4096, "layers": 16, "heads": 8, "vocab": 32768},
    "4GiB": {"hidden": 2048, "intermediate": 8192, "layers": 28, "heads": 16, "vocab": 65536},
}
RUNS = {
    "quick": (("float64", "streamed"), ("float64", "whole"), ("bfloat16", "streamed")),
    "0.7GB": (("float64", "streamed"), ("float64", "whole")),
    "4GiB": (("float64", "streamed"), ("bfloat16", "streamed"), ("bfloat16", "whole")),
}
"""What is run for each size, in turn."""

BATCH, TOKENS = 2, 32


def make(directory: Path, size: str) -> None:
    """Write a Llama checkpoint, one shard a layer, with at most one shard in memory."""
    import torch
    from safetensors.torch import save_file

    sizes = SIZES[size]
    hidden, vocab = sizes["hidden"], sizes["vocab"]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": sizes["intermediate"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads"],
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    linears = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    shapes = {f"self_attn.{name}": shape for name, shape in linears.items()}
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (sizes["intermediate"], hidden))
    shapes |= {"mlp.down_proj": (hidden, sizes["intermediate"])}
    shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    layers = [
        {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        for layer in range(sizes["layers"])
    ]
    shards = [
        {"model.embed_tokens.weight": (vocab, hidden)},
        *layers,
        {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)},
    ]
    files: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for tensor, shape in shard.items():
            drawn = torch.randn(shape, generator=generator)
            tensors[tensor] = (drawn * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)).bfloat16()
        save_file(tensors, directory / name)
        files |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))


def child(directory: Path, how: str, dtype: str) -> dict[str, Any]:
    """Run the model once and say how long it took and what came out."""
    import torch

    from tpcheck.reference.checkpoint import load_decoder, read_spec
    from tpcheck.reference.streaming import group_of_one, stored_dtype, stream_logits

    generator = torch.Generator().manual_seed(7)
    vocab = read_spec(directory).vocab_size
    input_ids = torch.randint(0, vocab, (BATCH, TOKENS), generator=generator)
    before = resident_mb()
    started = time.perf_counter()
    if how == "streamed":
        logits = stream_logits(directory, input_ids, dtype=dtype)
    else:
        tp = group_of_one(getattr(torch, dtype), stored_dtype(directory))
        with torch.no_grad():
            logits = load_decoder(directory, tp)(input_ids)
    seconds = time.perf_counter() - started
    data = logits.contiguous().view(torch.uint8).numpy().data
    return {
        "seconds": round(seconds, 2),
        "before_mb": before,
        "logits": hashlib.sha256(data).hexdigest(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def resident_mb() -> int:
    """Return what this process holds before a model: python, torch and tpcheck."""
    text = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmRSS:\s*(\d+)", text)[0]) // 1024


def measured(directory: Path, how: str, dtype: str) -> dict[str, Any]:
    """Run one child under `/usr/bin/time -v`, and return what both of them say."""
    command = [sys.executable, __file__, "--child", how, "--dtype", dtype, "--model"]
    done = subprocess.run(
        ["/usr/bin/time", "-v", *command, str(directory)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    said = dict(re.findall(r"^\t(.+?): (.+)$", done.stderr, re.MULTILINE))
    shown = shlex.join(["/usr/bin/time", "-v", "python", "benchmarks/streaming.py", *command[2:]])
    return {
        "how": how,
        "dtype": dtype,
        "command": f"{shown} MODEL",
        "peak_rss_mb": int(said["Maximum resident set size (kbytes)"]) // 1024,
        "user_s": float(said["User time (seconds)"]),
        "major_faults": int(said["Major (requiring I/O) page faults"]),
        **json.loads(done.stdout),
    }


def compared(directory: Path, size: str, repeats: int) -> dict[str, Any]:
    """Return every run of a size, and how streaming stands to holding everything."""
    runs: list[dict[str, Any]] = []
    for _ in range(repeats):
        for dtype, how in RUNS[size]:
            runs.append(measured(directory, how, dtype))
            one = runs[-1]
            print(f"{size} {how} {dtype}: {one['peak_rss_mb']} MB, {one['seconds']} s", flush=True)
    ratios = {}
    for dtype in dict.fromkeys(one["dtype"] for one in runs):
        ways = {
            how: [one for one in runs if (one["dtype"], one["how"]) == (dtype, how)]
            for how in ("streamed", "whole")
        }
        if not ways["whole"]:
            continue
        time_s, peak_mb = (
            {how: pick(one[key] for one in found) for how, found in ways.items()}
            for key, pick in (("seconds", min), ("peak_rss_mb", max))
        )
        ratios[dtype] = {
            "time": round(time_s["streamed"] / time_s["whole"], 3),
            "peak_rss": round(peak_mb["streamed"] / peak_mb["whole"], 3),
            "same_bits": len({one["logits"] for found in ways.values() for one in found}) == 1,
        }
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {
        "sizes": SIZES[size],
        "checkpoint_bytes": stored,
        "one_layer_float64_mb": 8 * layer_weights(size) // 2**20,
        "tokens": [BATCH, TOKENS],
        "streamed_over_whole": ratios,
        "runs": runs,
    }


def layer_weights(size: str) -> int:
    """Return how many weights one layer has, norms aside."""
    sizes = SIZES[size]
    return 4 * sizes["hidden"] ** 2 + 3 * sizes["hidden"] * sizes["intermediate"]


def main() -> None:
    """Make each size's checkpoint in a folder that goes afterwards, run it, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", default="0.7GB,4GiB", help=", ".join(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; a temporary one")
    parser.add_argument("--child", choices=("make", "streamed", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float64", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "make":
        make(options.model, options.sizes)
        return
    if options.child:
        print(json.dumps(child(options.model, options.child, options.dtype)))
        return
    result = {}
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            command = [sys.executable, __file__, "--child", "make", "--sizes", size, "--model"]
            subprocess.run([*command, folder], check=True)
            result[size] = compared(Path(folder), size, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
