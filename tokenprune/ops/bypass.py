"""Bypass: the grid stays; kept tokens go through the MLP, dropped ones through a light branch.

DynamicViT, section 3.5 (the hierarchical models of the T-PAMI version).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tokenprune.ops.align import is_kept
from tokenprune.ops.layout import TOKENS, Layout, flat_tokens, flat_tokens_back
from tokenprune.ops.moving import gather_tokens, poisonous
from tokenprune.ops.selection import indices_of

__all__ = ["choose_branch", "merge_branches", "take_tokens"]


def take_tokens(
    x: Shaped[Tensor, "..."], rows: Int[Tensor, "B K"], layout: Layout = TOKENS
) -> Shaped[Tensor, "..."]:
    """The tokens at `rows` of a grid or sequence; all of them, untouched, if K = L.

    As many dims as `x`, so that what follows runs on it unchanged: [B, K, D], [B, 1, K, D] or,
    with channels first, [B, D, 1, K].
    """
    tokens = flat_tokens(x, layout)
    if rows.shape[1] == tokens.shape[1]:
        return x
    shape = layout.gathered(x.shape, rows.shape[1])
    return flat_tokens_back(gather_tokens(tokens, rows, 0), shape, layout)


def merge_branches(
    x: Float[Tensor, "..."],
    branch: Float[Tensor, "..."],
    rows: Int[Tensor, "B K"],
    bypass: nn.Module | None,
    layout: Layout = TOKENS,
) -> Float[Tensor, "..."]:
    """The branch of every token: `branch` of the kept ones at `rows`, `bypass` run on the others;
    0 without it.

    `x` is what the block adds its branch to; `branch` is laid out as by `take_tokens`.
    """
    tokens = flat_tokens(x, layout)
    batch, count = tokens.shape[:2]
    if rows.shape[1] == count:
        return branch
    one_row = Layout(1, layout.channels_first)  # not _replace(), which torch 2.8 cannot compile
    kept = flat_tokens(branch, one_row)
    if bypass is None:  # all others read one more token, which is 0
        number = torch.arange(kept.shape[1], device=x.device).expand(batch, -1)
        place = torch.full((batch, count), kept.shape[1], device=x.device).scatter(1, rows, number)
        merged = F.pad(kept, (0, 0, 0, 1))
        return flat_tokens_back(gather_tokens(merged, place, 0), x.shape, layout)
    others = torch.ones(batch, count, device=x.device, dtype=torch.bool).scatter(1, rows, False)
    dropped = indices_of(others, count - rows.shape[1])
    light = bypass(take_tokens(tokens, dropped)).to(branch.dtype)
    merged = torch.cat([kept, light], dim=1)
    # Where each token of the grid now is: moving whole rows by it beats scattering every number.
    order = torch.cat([rows, dropped], dim=1)
    here = torch.arange(count, device=x.device).expand(batch, -1)
    place = torch.zeros_like(order).scatter(1, order, here)
    return flat_tokens_back(gather_tokens(merged, place, 0), x.shape, layout)


def choose_branch(
    x: Float[Tensor, "..."],
    branch: Float[Tensor, "..."],
    policy: Float[Tensor, "B L"],
    bypass: nn.Module | None,
    layout: Layout = TOKENS,
    poison: bool = False,
) -> Float[Tensor, "..."]:
    """The mask path's version: both branches for every token, one of them chosen. Without `bypass`
    the other one is 0.

    The policy's gradient at a token is <g, branch - bypass>; a branch that is not chosen never
    reaches the output, whatever it holds. `poison` overwrites it with NaN and inf (for `verify`).
    """
    shape, branch = branch.shape, flat_tokens(branch, layout)
    if bypass is None:
        light = torch.zeros_like(branch)
    else:
        light = bypass(flat_tokens(x, layout)).to(branch.dtype)
    weight = policy.to(branch.dtype).unsqueeze(-1)
    chosen = is_kept(policy).unsqueeze(-1)
    if poison:
        bad = poisonous(branch)
        branch, light = torch.where(chosen, branch, bad), torch.where(chosen, bad, light)
    branch = torch.where(chosen | branch.isfinite(), branch, 0.0)
    light = torch.where(chosen & ~light.isfinite(), 0.0, light)
    return flat_tokens_back(branch * weight + light * (1.0 - weight), shape, layout)
