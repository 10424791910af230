"""The recipe of a host that nobody wrote one for."""

from collections.abc import Sequence

from torch import nn

from tokenprune.analysis.tails import prunable_blocks
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.recipe import Recipe
from tokenprune.tracing.host_graph import Traced

__all__ = ["suggest_recipe"]

KEEP_RATIO = 0.7
# DynamicViT's for Swin: rho, rho - 0.2, rho - 0.4.
BYPASS_STEP = 0.2


def suggest_recipe(host: nn.Module, spec: ArchSpec, traced: Traced) -> Recipe:
    """Stages at a quarter, a half and three quarters of the blocks, keeping 0.7 of what there was.

    In bypass mode these are the blocks of the largest stretch on one grid that have a branch which
    tokens can go around.

    Args:
        host: The model.
        spec: What its adapter says.
        traced: One call of its forward in eval mode.

    Raises:
        PlanError: There are too few blocks.
    """
    bypass = spec.mode == "bypass"
    stretch = _stretch(host, spec, traced) if bypass else range(len(spec.blocks))
    first = 0 if bypass else 1  # what leaves before block 0 has never been looked at
    if len(stretch) <= first:
        need = "a block with a branch that tokens can go around" if bypass else "two blocks"
        raise PlanError(
            f"A host needs at least {need} to be pruned, but among the {len(spec.blocks)} blocks "
            f"that adapter {spec.adapter!r} found in {type(host).__name__} there are "
            f"{len(stretch)}."
        )
    blocks = sorted({stretch[max(first, len(stretch) * part // 4)] for part in (1, 2, 3)})
    ratios = [
        KEEP_RATIO - BYPASS_STEP * stage if bypass else KEEP_RATIO ** (stage + 1)
        for stage in range(len(blocks))
    ]
    stages = [{"block": b, "keep_ratio": round(r, 3)} for b, r in zip(blocks, ratios, strict=True)]
    return Recipe.parse({"version": 1, "mode": spec.mode, "stages": stages})


def _stretch(host: nn.Module, spec: ArchSpec, traced: Traced) -> Sequence[int]:
    grids = prunable_blocks(host, traced, spec.num_prefix_tokens)
    return max(grids.values(), key=len, default=[])
