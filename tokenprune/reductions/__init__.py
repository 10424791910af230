"""What becomes of the tokens that a stage does not keep: one file a reduction."""

from tokenprune.reductions.bypass import Bypass
from tokenprune.reductions.protocol import Proof, Reduction
from tokenprune.reductions.registry import reduction_by_name, reduction_names, register_reduction
from tokenprune.reductions.remove import Remove

__all__ = [
    "Bypass",
    "Proof",
    "Reduction",
    "Remove",
    "reduction_by_name",
    "reduction_names",
    "register_reduction",
]
