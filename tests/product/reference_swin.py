"""Swin's forward in DynamicViT's bypass mode, written out from the papers; see `reference`.

Sources: the T-PAMI version of DynamicViT (arXiv 2207.01580, section 3.5), Swin (arXiv 2103.14030).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.product.reference import Noise, Result, Weights, decide, linear, mlp, norm, predict

__all__ = ["Swin", "run_swin"]


@dataclass(frozen=True)
class Swin:
    """Sizes that a state dict does not tell.

    Attributes:
        depths: Blocks of each level.
        heads: H of each level.
        window: Side of a window.
        stages: The block of each stage, counted over all levels; of one level.
        eps: Of the layer norms.
    """

    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    stages: tuple[int, ...]
    eps: float = 1e-5


def run_swin(
    w: Weights,
    images: Tensor,
    host: Swin,
    *,
    counts: Sequence[int] | None = None,
    noise: Noise | None = None,
    stale: bool = False,
) -> Result:
    """A forward of a Swin: dense, eval or training.

    A decision replaces the one before, so tokens come back. It holds to the end of the level.

    Args:
        counts: Eval: the best K go through the MLP.
        noise: Training: decisions are sampled with it.
        stale: Training as in the published code, where the branch that is not chosen goes on from
            its own last value. The output is the same, the decision's gradient is not.
    """
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = norm(w, "patch_embed.norm", x.permute(0, 2, 3, 1), host.eps)
    result = Result(x, x)
    block = 0
    for level, depth in enumerate(host.depths):
        if level:
            x = _merge_patches(w, f"layers.{level}.downsample", x, host.eps)
        pair: tuple[Tensor, Tensor] | None = None
        choice: Tensor | None = None
        for i in range(depth):
            name = f"layers.{level}.blocks.{i}"
            if pair is not None and choice is not None:
                x = pair[0] * choice + pair[1] * (1 - choice)
            if (counts is not None or noise is not None) and block in host.stages:
                stage = host.stages.index(block)
                choice = _choose(w, x, stage, counts, noise, result)
                pair = (x, x)
            h = norm(w, f"{name}.norm1", x, host.eps)
            x = x + _window_attention(w, f"{name}.attn", h, host, level, shifted=bool(i % 2))
            if choice is None or pair is None:
                x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, host.eps))
            else:
                kept, left = x, x
                if stale:
                    kept = x * choice + pair[0] * (1 - choice)
                    left = x * (1 - choice) + pair[1] * choice
                light = f"token_bypasses.{block}"
                pair = (
                    x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", kept, host.eps)),
                    x + linear(w, f"{light}.1", norm(w, f"{light}.0", left, 1e-5)),
                )
            block += 1
        if pair is not None and choice is not None:
            x = pair[0] * choice + pair[1] * (1 - choice)
    x = norm(w, "norm", x, host.eps)
    result.tokens = x.flatten(1, 2)
    result.logits = linear(w, "head.fc", result.tokens.mean(1))
    return result


def _choose(
    w: Weights,
    x: Tensor,
    stage: int,
    counts: Sequence[int] | None,
    noise: Noise | None,
    result: Result,
) -> Tensor:
    """The decision as [B, height, width, 1]."""
    scores = predict(w, f"token_predictors.{stage}", x.flatten(1, 2), None)
    result.keep_logits.append(scores)
    if noise is not None:
        decision = decide(scores, noise(stage, scores))
        result.decisions.append(decision)
    else:
        order = scores[..., 0].argsort(dim=1, descending=True, stable=True)
        kept = order[:, : counts[stage]].sort(1).values
        result.kept.append(kept)
        decision = torch.zeros_like(scores[..., 0]).scatter(1, kept, 1.0)
    return decision.reshape(*x.shape[:3], 1)


def _merge_patches(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return linear(w, f"{name}.reduction", norm(w, f"{name}.norm", torch.cat(corners, -1), eps))


def _window_attention(
    w: Weights, name: str, x: Tensor, host: Swin, level: int, shifted: bool
) -> Tensor:
    """Attention among the tokens of each window, the windows moved by half a side if `shifted`."""
    batch, side, _, width = x.shape
    window = min(host.window, side)
    shift = window // 2 if shifted and side > window else 0
    heads, size = host.heads[level], window * window
    parts = _windows(x.roll((-shift, -shift), (1, 2)), window)  # [B, windows, size, D]
    q, k, v = (
        linear(w, f"{name}.qkv", parts)
        .reshape(batch, -1, size, 3, heads, width // heads)
        .permute(3, 0, 1, 4, 2, 5)
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    offset = at[:, None] - at[None] + window - 1
    index = offset[..., 0] * (2 * window - 1) + offset[..., 1]
    scores = scores + w[f"{name}.relative_position_bias_table"][index].permute(2, 0, 1)
    if shift:
        # rolled tokens meet others from the far side of the image, which they must not see
        band = torch.zeros(side, dtype=torch.long)
        band[side - window : side - shift], band[side - shift :] = 1, 2
        region = _windows((band[:, None] * 3 + band)[None, ..., None], window)[0, ..., 0]
        apart = region[:, :, None] != region[:, None, :]
        scores = scores.masked_fill(apart[None, :, None], float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(2, 3).reshape(batch, -1, size, width)
    out = linear(w, f"{name}.proj", out)
    rows = out.reshape(batch, side // window, side // window, window, window, width)
    return rows.transpose(2, 3).reshape(x.shape).roll((shift, shift), (1, 2))


def _windows(x: Tensor, window: int) -> Tensor:
    batch, side, _, width = x.shape
    count = side // window
    x = x.reshape(batch, count, window, count, window, width).transpose(2, 3)
    return x.reshape(batch, count * count, window * window, width)
