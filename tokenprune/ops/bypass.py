"""Bypass mode: the grid stays; kept tokens go through the MLP, dropped ones through a light branch.

DynamicViT, section 3.5 (the hierarchical models of the T-PAMI version).
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tokenprune.ops._align import is_kept

__all__ = ["choose_branch", "flat_tokens", "merge_branches", "poisonous", "take_tokens"]


def flat_tokens(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "B N D"]:
    """[B, N, D] tokens of a grid [B, H, W, D], row by row; [B, N, D] stays as it is."""
    return x.flatten(1, -2)


def poisonous(x: Float[Tensor, "... D"]) -> Float[Tensor, " D"]:
    """NaN and inf in turn, one row as wide as `x`: what `verify` puts where nobody may look."""
    odd = torch.arange(x.shape[-1], device=x.device) % 2 == 1
    return torch.where(odd, x.new_tensor(float("inf")), x.new_tensor(float("nan")))


def take_tokens(
    x: Shaped[Tensor, "B ..."], keep_indices: Int[Tensor, "B K"]
) -> Shaped[Tensor, "B K D"]:
    """The tokens at `keep_indices` of a grid or sequence; all of them, untouched, if K = N."""
    tokens = flat_tokens(x)
    if keep_indices.shape[1] == tokens.shape[1]:
        return tokens
    return tokens.gather(1, keep_indices.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def merge_branches(
    x: Float[Tensor, "B ..."],
    branch: Float[Tensor, "B K D"],
    keep_indices: Int[Tensor, "B K"],
    bypass: nn.Module,
) -> Float[Tensor, "B ..."]:
    """Put both branches back on the grid; each is computed for its own tokens only.

    Args:
        x: What the branches read, [B, N, D] or [B, H, W, D].
        branch: The MLP's result for kept tokens.
        keep_indices: Which those are, ascending.
        bypass: The light branch, run on all other tokens.
    """
    tokens = flat_tokens(x)
    batch, count, width = tokens.shape
    if keep_indices.shape[1] == count:
        return branch.reshape(x.shape)
    kept = torch.zeros(batch, count, device=x.device).scatter(1, keep_indices, 1.0)
    dropped = kept.argsort(dim=1, stable=True)[:, : count - keep_indices.shape[1]]
    light = bypass(take_tokens(tokens, dropped)).to(branch.dtype)
    index = torch.cat([keep_indices, dropped], dim=1).unsqueeze(-1).expand(-1, -1, width)
    merged = torch.cat([branch, light], dim=1)
    return torch.zeros_like(merged).scatter(1, index, merged).reshape(x.shape)


def choose_branch(
    x: Float[Tensor, "B ..."],
    branch: Float[Tensor, "B ..."],
    decision: Float[Tensor, "B N"],
    bypass: nn.Module,
    poison: bool = False,
) -> Float[Tensor, "B ..."]:
    """The mask path's version: both branches for every token, one of them chosen.

    The decision's gradient at a token is <g, branch - bypass>; a branch that is not chosen never
    reaches the output, whatever it holds.

    Args:
        poison: Overwrite the branch that is not chosen with NaN and inf (`verify`).
    """
    light = bypass(flat_tokens(x)).reshape(branch.shape).to(branch.dtype)
    weight = decision.to(branch.dtype).reshape(*branch.shape[:-1], 1)
    chosen = is_kept(decision).reshape(weight.shape)
    if poison:
        bad = poisonous(branch)
        branch, light = torch.where(chosen, branch, bad), torch.where(chosen, bad, light)
    branch = torch.where(chosen | branch.isfinite(), branch, 0.0)
    light = torch.where(chosen & ~light.isfinite(), 0.0, light)
    return branch * weight + light * (1.0 - weight)
