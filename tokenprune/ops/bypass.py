"""Bypass mode: the grid stays; kept tokens go through the MLP, dropped ones through a light branch.

DynamicViT, section 3.5 (the hierarchical models of the T-PAMI version).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tokenprune.ops.align import is_kept
from tokenprune.ops.selection import gather_tokens, indices_of

__all__ = [
    "TOKENS",
    "Layout",
    "choose_branch",
    "flat_tokens",
    "flat_tokens_back",
    "kept_rows",
    "merge_branches",
    "poisonous",
    "take_tokens",
]


class Layout(NamedTuple):
    """How a tensor holds the L tokens of each image, D channels each.

    Attributes:
        fold: Rows of dim 0 per image: 1, or the windows or pixels that a host counts there too.
        channels_first: [B, D, ...] instead of [B, ..., D].
    """

    fold: int = 1
    channels_first: bool = False

    def gathered(self, shape: torch.Size, count: int) -> tuple[int, ...]:
        """The shape of `take_tokens`: every dim that counts tokens is 1 but one, which is K."""
        inner = (1,) * (len(shape) - 3) + (count,) if len(shape) > 2 else (count,)
        batch = shape[0] // self.fold
        if self.channels_first:
            return (batch, shape[1], *inner)
        return (batch, *inner, shape[-1])


TOKENS = Layout()


def flat_tokens(x: Shaped[Tensor, "..."], layout: Layout = TOKENS) -> Shaped[Tensor, "B L D"]:
    """[B, L, D] tokens of a grid, row by row; [B, L, D] stays as it is."""
    if layout.channels_first:
        x = x.flatten(2).transpose(1, 2)
    return x.reshape(x.shape[0] // layout.fold, -1, x.shape[-1])


def flat_tokens_back(tokens: Shaped[Tensor, "B L D"], x: Tensor, layout: Layout) -> Tensor:
    """`flat_tokens` back in the shape of `x`."""
    if not layout.channels_first:
        return tokens.reshape(x.shape)
    inner = math.prod(x.shape[2:])
    return tokens.reshape(x.shape[0], inner, x.shape[1]).transpose(1, 2).reshape(x.shape)


def poisonous(x: Float[Tensor, "... D"]) -> Float[Tensor, " D"]:
    """NaN and inf in turn, one row as wide as `x`: what `verify` puts where nobody may look."""
    odd = torch.arange(x.shape[-1], device=x.device) % 2 == 1
    return torch.where(odd, x.new_tensor(float("inf")), x.new_tensor(float("nan")))


def kept_rows(keep_indices: Int[Tensor, "B K"], num_prefix: int) -> Int[Tensor, "B M"]:
    """Positions in [prefix, patches] of the prefix tokens and the kept patches."""
    if not num_prefix:
        return keep_indices
    prefix = torch.arange(num_prefix, device=keep_indices.device)
    prefix = prefix.expand(keep_indices.shape[0], -1)
    return torch.cat([prefix, keep_indices + num_prefix], dim=1)


def take_tokens(
    x: Shaped[Tensor, "..."], rows: Int[Tensor, "B K"], layout: Layout = TOKENS
) -> Shaped[Tensor, "..."]:
    """The tokens at `rows` of a grid or sequence; all of them, untouched, if K = L.

    Returns:
        As many dims as `x`, so that what follows runs on it as it stands: [B, K, D], [B, 1, K, D]
        or, with channels first, [B, D, 1, K].
    """
    tokens = flat_tokens(x, layout)
    if rows.shape[1] == tokens.shape[1]:
        return x
    kept = gather_tokens(tokens, rows, 0)
    if layout.channels_first:
        kept = kept.transpose(1, 2)
    return kept.reshape(layout.gathered(x.shape, rows.shape[1]))


def merge_branches(
    x: Float[Tensor, "..."],
    branch: Float[Tensor, "..."],
    rows: Int[Tensor, "B K"],
    bypass: nn.Module,
    layout: Layout = TOKENS,
) -> Float[Tensor, "..."]:
    """Put both branches back on the grid; each is computed for its own tokens only.

    Args:
        x: What the block adds its branch to.
        branch: The MLP's result for kept tokens, as `take_tokens` lays them out.
        rows: Which those are, ascending.
        bypass: The light branch, run on all other tokens.
    """
    tokens = flat_tokens(x, layout)
    batch, count = tokens.shape[:2]
    if rows.shape[1] == count:
        return branch
    others = torch.ones(batch, count, device=x.device, dtype=torch.bool).scatter(1, rows, False)
    dropped = indices_of(others, count - rows.shape[1])
    light = bypass(take_tokens(tokens, dropped)).to(branch.dtype)
    one_row = layout._replace(fold=1)
    merged = torch.cat([flat_tokens(branch, one_row), light], dim=1)
    # Where each token of the grid now is: moving whole rows by it beats scattering every number.
    order = torch.cat([rows, dropped], dim=1)
    here = torch.arange(count, device=x.device).expand(batch, -1)
    place = torch.zeros_like(order).scatter(1, order, here)
    return flat_tokens_back(gather_tokens(merged, place, 0), x, layout)


def choose_branch(
    x: Float[Tensor, "..."],
    branch: Float[Tensor, "..."],
    policy: Float[Tensor, "B L"],
    bypass: nn.Module,
    layout: Layout = TOKENS,
    poison: bool = False,
) -> Float[Tensor, "..."]:
    """The mask path's version: both branches for every token, one of them chosen.

    The policy's gradient at a token is <g, branch - bypass>; a branch that is not chosen never
    reaches the output, whatever it holds.

    Args:
        poison: Overwrite the branch that is not chosen with NaN and inf (`verify`).
    """
    shape, branch = branch, flat_tokens(branch, layout)
    light = bypass(flat_tokens(x, layout)).to(branch.dtype)
    weight = policy.to(branch.dtype).unsqueeze(-1)
    chosen = is_kept(policy).unsqueeze(-1)
    if poison:
        bad = poisonous(branch)
        branch, light = torch.where(chosen, branch, bad), torch.where(chosen, bad, light)
    branch = torch.where(chosen | branch.isfinite(), branch, 0.0)
    light = torch.where(chosen & ~light.isfinite(), 0.0, light)
    return flat_tokens_back(branch * weight + light * (1.0 - weight), shape, layout)
