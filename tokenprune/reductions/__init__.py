"""What becomes of the tokens that a stage does not keep: one file a reduction."""

from tokenprune.reductions.bypass import Bypass
from tokenprune.reductions.exact import Exact
from tokenprune.reductions.fuse import Fuse
from tokenprune.reductions.merge import Merge
from tokenprune.reductions.protocol import MODES, Proof, Reduction
from tokenprune.reductions.remove import Remove
from tokenprune.reductions.skip import Skip
from tokenprune.reductions.windows import WindowsReduction

__all__ = [
    "MODES",
    "Bypass",
    "Exact",
    "Fuse",
    "Merge",
    "Proof",
    "Reduction",
    "Remove",
    "Skip",
    "WindowsReduction",
]
