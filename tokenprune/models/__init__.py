"""Models that timm lacks, registered with it on import.

`import tokenprune.models` is enough: `timm.create_model("lvvit_s")` then works.
"""

from tokenprune.errors import MissingDependencyError

try:
    from tokenprune.models.lvvit import LVViT, lvvit_l, lvvit_m, lvvit_s, lvvit_t
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "timm":
        raise
    raise MissingDependencyError(
        "tokenprune.models registers its models with timm, which is not installed. "
        "Run: pip install 'tokenprune-torch[timm]'"
    ) from error

__all__ = ["LVViT", "lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
