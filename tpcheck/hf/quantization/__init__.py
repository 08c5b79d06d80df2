"""Read a config.json's quantization_config as a Quantization. Torch-free.

Requirement: the record says what the checkpoint stores and computes, or a PlanError names the field
and value that the reference decoder cannot do. A field that nobody here knows is refused where it
is set: that it changes nothing is more than can be known.
"""

from __future__ import annotations

from tpcheck.errors import PlanError
from tpcheck.hf.fields import Config
from tpcheck.hf.quantization.compressed_tensors import KNOWN, read_compressed_tensors
from tpcheck.hf.quantization.fields import CONFIG, refuse_unknown, refused
from tpcheck.hf.quantization.methods import METHODS
from tpcheck.json_reader import brief
from tpcheck.quantization import Quantization

__all__ = ["read_quantization"]

_READERS = {**METHODS, "compressed-tensors": (read_compressed_tensors, KNOWN)}


def read_quantization(config: Config) -> Quantization | None:
    """Return how a model's linear layers are stored, None where they are not quantized.

    Args:
        config: the fields of a config.json.

    Raises:
        PlanError: a field is missing, malformed, unknown, or asks for what the reference decoder
            cannot do; names it and its value.
    """
    fields = config.get(CONFIG)
    if fields is None:
        fields = config.get("compression_config")  # as older compressed-tensors spelled it
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise PlanError(f"config: {CONFIG}={brief(fields)}, but should be an object of fields")
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise refused("quant_method", method, f"one of {', '.join(_READERS)}")
    _require_model(method, config.get("model_type"))
    read, known = _READERS[method]
    refuse_unknown(fields, known)
    try:
        return read(fields)
    except PlanError as error:
        if str(error).startswith("config: "):
            raise
        said = str(error).removeprefix("quantization: ")
        raise PlanError(f"config: {CONFIG}.{said}") from error


def _require_model(method: str, model_type: object) -> None:
    """Raise for a method that the names of a model's tensors are not known for."""
    if model_type == "gpt2":
        raise refused("quant_method", method, "absent", ": gpt2's weights are stored transposed")
    if (method == "mxfp4") != (model_type == "gpt_oss"):
        expected = "mxfp4" if model_type == "gpt_oss" else "another: mxfp4 is gpt_oss's own"
        raise refused("quant_method", method, expected, f" [{model_type}]")
