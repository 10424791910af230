"""How each path says which tokens are left: one file a path."""

from tokenprune.rewrite.kept.fused import FusedGathered, FusedMasked
from tokenprune.rewrite.kept.gathered import Gathered
from tokenprune.rewrite.kept.jagged import Jagged
from tokenprune.rewrite.kept.masked import Masked
from tokenprune.rewrite.kept.merged import ExpandedSet, MergedSet
from tokenprune.rewrite.kept.protocol import KeptSet, StagePoint
from tokenprune.rewrite.settings import PathName

__all__ = [
    "FUSED_SETS",
    "KEPT_SETS",
    "MERGED_SETS",
    "ExpandedSet",
    "Gathered",
    "Jagged",
    "KeptSet",
    "Masked",
    "MergedSet",
    "StagePoint",
]

KEPT_SETS: dict[PathName, KeptSet] = {kept.name: kept for kept in (Masked(), Gathered(), Jagged())}
FUSED_SETS: dict[PathName, KeptSet] = {k.name: k for k in (FusedMasked(), FusedGathered())}
MERGED_SETS: dict[PathName, KeptSet] = {kept.name: kept for kept in (MergedSet(), ExpandedSet())}
