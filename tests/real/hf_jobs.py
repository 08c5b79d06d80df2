"""What the ranks of test_hf_adapter run besides tpcheck's own execution."""

import torch

from tpcheck.adapters import transformers as adapter


def load_unchecked(world, directory):
    """Load a model at a degree that tpcheck refuses, and return what transformers does about it."""
    tp = world.group(seed=0, dtype=torch.float32, weight_dtype=torch.float32)
    with adapter.quiet_and_offline():
        hf = adapter.import_transformers()
        try:
            model = adapter._load(hf, adapter._config(hf, directory), tp)
        except ValueError as error:
            return f"refused at load: {error}"
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False)
        except RuntimeError as error:
            return f"failed at the first forward: {error}"
    return "ran"
