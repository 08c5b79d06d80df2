"""`hf:DIR`: a local Hugging Face model, split by transformers' own tensor-parallel plan.

Requirement: what is tested is transformers, so its loader, its plan and its collectives run
untouched; tpcheck only lends its ranks. Nothing is downloaded, no remote code is run, and nothing
is unpickled: the directory has to hold config.json and safetensors.

[As Stored] Weights are loaded in `weight_dtype` and only then cast to `dtype`, so the float64
oracle computes with exactly the numbers a deployed run would hold.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tpcheck.adapters.transformers_runtime import import_transformers, quiet_and_offline, ranks_of
from tpcheck.errors import IllegalDegreeError, PlanError, SubjectError
from tpcheck.hf.config import describe_directory, read_config
from tpcheck.subjects import DEFAULT_SEQ_LEN, Subject, SubjectOptions

if TYPE_CHECKING:
    import torch

    from tpcheck.groups.base import TPGroup

_ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "num_heads": "num_attention_heads",
}
"""Names of older configs -> the names everybody else uses."""

_QUERY_PROJECTIONS = ("q_proj", "q_b_proj", "kv_b_proj", "qkv_proj", "query_key_value", "c_attn")
_KEY_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn")


def load_directory(directory: str) -> Subject:
    """Return the subject `hf:DIR`; its vocabulary and longest input come from config.json.

    Raises:
        SubjectError: not a model directory; names the path and what is missing.
    """
    config = hf_config(directory)
    longest = config.get("max_position_embeddings") or DEFAULT_SEQ_LEN
    options = SubjectOptions(vocab_size=config["vocab_size"], seq_len=min(DEFAULT_SEQ_LEN, longest))
    return Subject(f"hf:{directory}", build_hf(directory), options)


def hf_config(directory: str | Path) -> dict[str, Any]:
    """Return the text model's fields of a directory's config.json, without torch.

    A nested `text_config` is lifted to the top, and old names (`n_embd`) are given the common ones.

    Raises:
        SubjectError: the directory or its config.json is not there; names the path and what is.
        PlanError: config.json is malformed, or has no vocab_size.
    """
    fields = read_config(Path(directory))
    nested = fields.get("text_config")
    if isinstance(nested, dict):
        fields = {**fields, **nested}
    for old, new in _ALIASES.items():
        if old in fields:
            fields.setdefault(new, fields[old])
    vocab_size = fields.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise PlanError(
            f"{directory}/config.json: vocab_size={vocab_size!r}, but should be a whole number >= 1"
        )
    return fields


def build_hf(directory: str | Path) -> Callable[[TPGroup], Callable[..., torch.Tensor]]:
    """Return a build function that runs the model in `directory` under transformers' TP plan.

    The forward maps int64 ids [batch, seq] to full logits [batch, seq, vocab] on every rank and
    carries `facts` (attention, transformers, tp_plan, experts), `trace_points` and the `model`.

    Raises:
        SubjectError: not a model directory.
    """
    path = Path(directory).absolute()
    read_config(path)
    if not any(path.glob("*.safetensors")):
        raise SubjectError(
            f"{path}: *.safetensors is not there; {describe_directory(path)};"
            " pickled weights are not read: convert them with transformers' save_pretrained"
        )
    return functools.partial(_build, str(path))


def _build(directory: str, tp: TPGroup) -> Callable[..., torch.Tensor]:
    import torch

    with quiet_and_offline():
        transformers = import_transformers()
        config = _config(transformers, directory)
        skeleton = _skeleton(transformers, config)
        _require_shapes(directory, skeleton)
        refuse_illegal_degree(skeleton, tp.size)
        model, unread = _load(transformers, config, tp)
    if tp.dtype != tp.weight_dtype:
        model = model.to(tp.dtype)

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: Any = model(input_ids=input_ids, use_cache=False).logits
        whole: torch.Tensor = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        return whole

    forward.model = model  # type: ignore[attr-defined]
    forward.facts = _facts(transformers, model, tp, unread)  # type: ignore[attr-defined]
    forward.trace_points = _trace_points(model)  # type: ignore[attr-defined]
    return forward


def _config(transformers: Any, directory: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a config.json can make its class raise
        raise SubjectError(
            f"{directory}: transformers {transformers.__version__} cannot read its config.json:"
            f" {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _skeleton(transformers: Any, config: Any) -> Any:
    """Return the model on the meta device: its class and its plan without its weights."""
    import torch

    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise SubjectError(
            f"{config.name_or_path}: model_type={config.model_type!r} is no causal language model"
            f" of transformers {transformers.__version__}: {str(error).splitlines()[0][:200]}"
        ) from error
    except Exception as error:  # no weight and no rank is in it yet: the config is what it is of
        raise SubjectError(
            f"{config.name_or_path}: transformers {transformers.__version__} cannot make the model"
            f" of its config.json: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        ) from error


def _require_shapes(directory: str, skeleton: Any) -> None:
    """Hold the files' headers against the model: what transformers says of it names no file.

    Names that only one side has are transformers' to map, and packed weights have other shapes.

    Raises:
        SubjectError: a file of the index is not there or cannot be read, or a tensor has another
            shape than config.json makes it; names both.
    """
    from tpcheck.reference.tensor_files import Checkpoint

    checkpoint = Checkpoint(directory)
    if getattr(skeleton.config, "quantization_config", None) is not None:
        return
    wanted = skeleton.state_dict()
    for name in checkpoint.names:
        if name in wanted and checkpoint.shape(name) != tuple(wanted[name].shape):
            raise SubjectError(
                f"{directory}: {name}: shape={list(checkpoint.shape(name))}, but config.json makes"
                f" it {list(wanted[name].shape)} [{skeleton.config.model_type}]"
            )


def _load(transformers: Any, config: Any, tp: TPGroup) -> tuple[Any, list[str]]:
    """Return the model on this rank's device, and the tensors of its files that it has no use for.

    Raises:
        SubjectError: files cannot be read, or weights are missing.
    """
    import torch

    options: dict[str, Any] = {}
    if tp.size > 1:
        options["distributed_config"] = transformers.DistributedConfig(tp_size=tp.size)
    # The grouped matmul of MoE layers refuses float64; the loop over experts does not.
    if tp.dtype == torch.float64:
        options["experts_implementation"] = "eager"
    directory = config.name_or_path
    try:
        with ranks_of(tp):
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=tp.weight_dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError) as error:
        raise SubjectError(f"{directory}: its weights cannot be read: {error}") from error
    missing = sorted(loading["missing_keys"])
    # transformers would fill them with random numbers, other ones on every rank.
    if missing:
        raise SubjectError(
            f"{directory}: {len(missing)} weights are not there: {', '.join(missing[:3])}"
        )
    return model.to(tp.device).eval(), sorted(loading["unexpected_keys"])


def refuse_illegal_degree(model: Any, tp_size: int) -> None:
    """Raise IllegalDegreeError where transformers would refuse, or fail at its first forward.

    Args:
        model: a transformers model (its weights are not looked at).
        tp_size: the degree asked for; 1 is always legal.

    Raises:
        IllegalDegreeError: names the field, its value and what transformers itself would do.
    """
    if tp_size == 1:
        return
    config = model.config.get_text_config()
    case = f"[{config.model_type}, tp_size={tp_size}]"
    plan: Mapping[str, str] = model.tp_plan or {}
    if not plan:
        name = type(model).__name__
        raise IllegalDegreeError(
            f"{name}: tp_plan=None, but should be a plan {case}\n"
            "  transformers itself refuses it at load with a ValueError\n"
            "  tp_size that fit this model: 1\n"
            "  ref:DIR splits the same weights in tpcheck's own decoder, if it knows the model",
            legal_tp_sizes=(1,),
        )
    counts = _sharded_head_counts(config, plan)
    most = max(counts.values(), default=tp_size)
    legal = [t for t in range(1, most + 1) if not any(count % t for count in counts.values())]
    for field, count in counts.items():
        if count % tp_size:
            raise IllegalDegreeError(
                f"layers.*.self_attn: {field}={count}, but should be divisible by"
                f" tp_size={tp_size} {case}\n"
                "  transformers itself loads it and fails at the first forward: its plan cuts the"
                " projections by columns, in the middle of a head, and replicates no KV head\n"
                f"  tp_size that fit this model, up to {most}: {', '.join(map(str, legal))}",
                legal_tp_sizes=legal,
            )


def _sharded_head_counts(config: Any, plan: Mapping[str, str]) -> dict[str, int]:
    """Return the head counts that have to divide, because the plan cuts their projections."""
    cut = {name.rsplit(".", 1)[-1] for name, style in plan.items() if style == "colwise"}
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    counts = {}
    if isinstance(heads, int) and cut.intersection(_QUERY_PROJECTIONS):
        counts["num_attention_heads"] = heads
    if isinstance(kv_heads, int) and cut.intersection(_KEY_PROJECTIONS):
        counts["num_key_value_heads"] = kv_heads
    return counts


def _facts(transformers: Any, model: Any, tp: TPGroup, unread: list[str]) -> dict[str, Any]:
    """Return what carried the run: versions, kernels and how much of the model was split."""
    sharded = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if _is_sharded(p)}
    facts: dict[str, Any] = {
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
        "tp_plan": len(sharded),
    }
    experts = getattr(model.config, "_experts_implementation", None)
    if experts is not None and any("experts" in name for name, _ in model.named_modules()):
        facts["experts"] = experts
    said = []
    if tp.size > 1 and not any(re.search(r"\.\d+\.", name) for name in sharded):
        said.append(
            f"transformers {transformers.__version__} shards no decoder layer of"
            f" {type(model).__name__}: every rank computes the same thing"
        )
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        said.append(f"transformers has no use for {', '.join(unread[:3])}{more} of the checkpoint")
    if said:
        facts["note"] = "; ".join(said)
    return facts


def _is_sharded(parameter: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) and any(
        not placement.is_replicate() for placement in parameter.placements
    )


def _trace_points(model: Any) -> dict[str, Any]:
    """Return {fqn: module} for leaves, decoder layers and a layer's direct children, undeclared."""
    import torch

    modules = dict(model.named_modules())
    blocks = {
        f"{name}.{index}"
        for name, module in modules.items()
        if isinstance(module, torch.nn.ModuleList)
        for index in range(len(module))
    }
    prefix = f"{model.base_model_prefix}."
    return {
        name.removeprefix(prefix): module
        for name, module in modules.items()
        if name in blocks
        or name.rpartition(".")[0] in blocks
        or (name and not any(module.children()))
    }
