"""The operations of the networks, one function per operation.

Each function takes plain tensors and has the contract written in `kernels.reference`. On a CPU the
reference itself runs: plain torch whose backward passes are written out by hand.
"""

from kernels.reference import (
    LinearOperands,
    LowRank,
    Routing,
    combine,
    dispatch,
    dropout,
    grouped_lora_linear,
    keep_mask,
    linear_cross_entropy,
    lora_linear,
    rms_norm,
    rope,
    route,
    row_keys,
    swiglu,
)

# transformers probes for a package called `kernels` and parses its version.
__version__ = "0.0.0"

__all__ = [
    "LinearOperands",
    "LowRank",
    "Routing",
    "combine",
    "dispatch",
    "dropout",
    "grouped_lora_linear",
    "keep_mask",
    "linear_cross_entropy",
    "lora_linear",
    "rms_norm",
    "rope",
    "route",
    "row_keys",
    "swiglu",
]
