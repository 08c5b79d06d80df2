"""Record what every module returns: one safetensors file per rank, for `tpcheck diff`.

    python examples/dump_activations.py captures
    tpcheck diff captures/tp1 captures/tp2 --atol 0.05

`recording` is all you need in your own server or test: it wants torch and safetensors only. The
rest runs the model of own_module.py at TP=1 and at TP=2 on the same weights and input.
"""

import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from own_module import SHAPES, Model
from safetensors.torch import save_file


@contextmanager
def recording(model, folder, *, rank=0, tp_size=1):
    """Write what each module returned inside the block to folder/rank{rank}.safetensors.

    What a module returns a second time is kept under `name@2`. The file says in which order.
    """
    kept, calls = {}, {}

    def keep(name):
        def hook(_module, _arguments, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                local = output.to_local() if hasattr(output, "to_local") else output
                calls[name] = calls.get(name, 0) + 1
                key = name if calls[name] == 1 else f"{name}@{calls[name]}"
                # a copy: a collective may work in place on it right after
                kept[key] = local.detach().cpu().clone(memory_format=torch.contiguous_format)

        return hook

    hooks = [
        module.register_forward_hook(keep(name or "output"))
        for name, module in model.named_modules()
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
    Path(folder).mkdir(parents=True, exist_ok=True)
    facts = {"rank": str(rank), "tp_size": str(tp_size), "order": json.dumps(list(kept))}
    save_file(kept, Path(folder) / f"rank{rank}.safetensors", metadata=facts)


def serve(rank, tp_size, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp_size)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in SHAPES.items()}
    model = Model(96, 32, 64, dist.group.WORLD).bfloat16()
    model.load_weights(weights.items())
    with torch.no_grad(), recording(model, folder, rank=rank, tp_size=tp_size):
        model(torch.arange(24).reshape(2, 12))
    dist.destroy_process_group()


def main(folder):
    for tp_size in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            arguments = (tp_size, f"{place}/store", f"{folder}/tp{tp_size}")
            torch.multiprocessing.spawn(serve, arguments, nprocs=tp_size)


if __name__ == "__main__":
    main(sys.argv[1])
