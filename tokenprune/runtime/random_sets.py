"""Random kept sets, on which paths of one program are compared."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.ops.selection import in_order
from tokenprune.runtime.program import Programs

__all__ = ["random_sets"]


def random_sets(
    programs: Programs,
    batch_size: int,
    device: torch.device,
    share: float = 0.65,
    shortened: Callable[[Tensor], Tensor] = lambda kept: kept,
) -> tuple[Tensor, ...]:
    """Nested kept sets [B, K] that keep about a `share` each time, but always leave out something.
    Those that choose among all patches leave out the first and the last one, which a host may read
    by their places, or which is no patch. Each is `shortened`, where images may keep different
    numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    kept, sets = torch.empty(batch_size, 0, device="cpu"), list[Tensor]()
    staying = programs.analysis.plan.num_suffix
    for stage, patches in enumerate(programs.num_patches):
        if stage in programs.starts:
            kept = torch.arange(patches, device="cpu").expand(batch_size, -1)
        count = max(1, staying, min(kept.shape[1] - 1, round(kept.shape[1] * share)))
        rank = torch.rand(kept.shape, generator=generator, device="cpu")
        rank = rank + (kept < 0)  # padding last
        last = patches - staying
        if stage in programs.starts:
            rank[:, [0, last - 1]] = 1.0
        rank = rank.masked_fill(kept >= last, -1.0)  # these stay
        kept = shortened(in_order(kept.gather(1, rank.argsort(dim=1)[:, :count])))
        sets.append(kept.to(device))
    return tuple(sets)
