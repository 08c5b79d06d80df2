"""Known bugs, each as a small change of the reference decoder at TP > 1, or of its plan.

Requirement: every check has a fault only it, or a named other, catches; `tpcheck selfcheck` plants
them all and a surviving one fails the build. A fault changes instances of one rank's decoder, never
a class, so simulated ranks do not share it. Each names the public thread it re-makes. Torch-free at
import, so that the list can be shown at once. A new family of faults is a new module, named below.
"""

from tpcheck.faults import (
    biases,
    conduct,
    dtypes,
    gpt_oss,
    heads,
    layout,
    moe,
    norms,
    padding,
    plans,
    quant_activations,
    quant_codes,
    quant_padding,
    quant_plans,
    quant_scales,
    quant_straddling,
    quant_values,
    reductions,
    tokens,
    vocabulary,
)
from tpcheck.faults.planting import FAULTS, Fault

__all__ = [
    "FAULTS",
    "Fault",
    "biases",
    "conduct",
    "dtypes",
    "gpt_oss",
    "heads",
    "layout",
    "moe",
    "norms",
    "padding",
    "plans",
    "quant_activations",
    "quant_codes",
    "quant_padding",
    "quant_plans",
    "quant_scales",
    "quant_straddling",
    "quant_values",
    "reductions",
    "tokens",
    "vocabulary",
]
