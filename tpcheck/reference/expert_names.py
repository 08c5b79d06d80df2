"""Where checkpoints keep experts: a tensor each, Mixtral's own names, all in one, or gpt-oss's way.

Requirement: whichever way a checkpoint was saved, a logical weight is one slice of one stored
tensor. transformers 5 computes with all experts in one tensor; save_pretrained writes the older
one-each form that the Hub has, unless it is told to keep its own. gpt-oss has all in one tensor
everywhere, [in, out], with a feature of gate beside the same of up, and biases. Torch-free.
"""

from __future__ import annotations

from tpcheck.reference.layout import logical_tensors
from tpcheck.reference.stored import Stored
from tpcheck.spec import ModelSpec

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_FUSED = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2)}
_GPT_OSS_LEAVES = {"weight": "", "bias": "_bias"}


def expert_stored(spec: ModelSpec, names: tuple[str, ...]) -> dict[str, Stored]:
    """Return where a checkpoint with these tensor names stores each logical tensor."""
    if spec.model_type == "gpt_oss":
        return {name: _gpt_oss(name, spec) for name in logical_tensors(spec)}
    block = "block_sparse_moe" if any(".block_sparse_moe." in name for name in names) else "mlp"
    fused = any(name.endswith(".mlp.experts.down_proj") for name in names)
    return {name: _stored(name, block, fused, spec) for name in logical_tensors(spec)}


def _stored(name: str, block: str, fused: bool, spec: ModelSpec) -> Stored:
    layer, found, inner = name.partition(".mlp.")
    if not found:
        return Stored(name)
    if not inner.startswith("experts."):
        return Stored(f"{layer}.{block}.{inner}")
    _, expert, projection, leaf = inner.split(".")
    if fused:
        whole, part, parts = _FUSED.get(projection, (projection, 0, 1))
        stored = f"{layer}.mlp.experts.{whole}"
        return Stored(stored, part=part, parts=parts, index=int(expert), among=spec.num_experts)
    if block != "mlp":
        projection = _MIXTRAL[projection]
    return Stored(f"{layer}.{block}.experts.{expert}.{projection}.{leaf}")


def _gpt_oss(name: str, spec: ModelSpec) -> Stored:
    layer, found, inner = name.partition(".mlp.")
    if not found:
        return Stored(name)
    if not inner.startswith("experts."):
        return Stored(f"{layer}.mlp.router.{inner.removeprefix('gate.')}")
    _, expert, projection, leaf = inner.split(".")
    whole, part, parts = _FUSED.get(projection, (projection, 0, 1))
    return Stored(
        f"{layer}.mlp.experts.{whole}{_GPT_OSS_LEAVES[leaf]}",
        transposed=leaf == "weight",
        part=part,
        parts=parts,
        index=int(expert),
        among=spec.num_experts,
        interleaved=parts > 1,
    )
