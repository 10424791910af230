"""How much the class token attends to each token, beside an attention that stays fused."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

__all__ = ["class_logits", "class_row", "class_weights"]


def class_logits(
    query: Float[Tensor, "... Lq d"],
    key: Float[Tensor, "... L d"],
    attn_mask: Shaped[Tensor, "..."] | None,
    scale: float | None,
    rows_per_image: int,
) -> Float[Tensor, "B H L"]:
    """The logits of the first query of `F.scaled_dot_product_attention`, mask included.

    Args:
        query: queries of all tokens, the class token's first.
        key: keys; fewer heads than queries are shared by groups of them.
        attn_mask: bool (True is visible) or float, broadcasts to [..., Lq, L].
        scale: of the logits; None for d ** -0.5.
        rows_per_image: rows of dim 0 for each image: 1, or more if heads are among them.
    """
    if query.ndim > 3 and query.shape[-3] != key.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    first = query[..., :1, :] * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = (first @ key.mT).squeeze(-2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if attn_mask is not None:
        row = attn_mask[..., 0, :]
        hides = row.dtype == torch.bool
        logits = logits.masked_fill(~row, float("-inf")) if hides else logits + row
    return _by_image(logits, rows_per_image)


def class_row(scores: Float[Tensor, "... Lq L"], rows_per_image: int) -> Float[Tensor, "B H L"]:
    """The same, of an attention that forms its logits."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return _by_image(scores[..., 0, :].to(wide), rows_per_image)


def _by_image(logits: Float[Tensor, "... L"], rows_per_image: int) -> Float[Tensor, "B H L"]:
    heads = rows_per_image * math.prod(logits.shape[1:-1])  # not -1: there may be no image
    return logits.reshape(logits.shape[0] // rows_per_image, heads, logits.shape[-1])


def class_weights(
    logits: Float[Tensor, "B H L"], present: Float[Tensor, "B N"] | None, num_patches: int
) -> Float[Tensor, "B N"]:
    """Attention of the class token to each patch, averaged over the heads; 0 where none is.

    Args:
        logits: of the class token to prefix tokens, then patch tokens.
        present: 1 for patches that are there, 0 for dropped and padded ones; None if all are.
        num_patches: N.
    """
    if present is not None:
        hidden = F.pad(present <= 0.5, (logits.shape[-1] - num_patches, 0))
        logits = logits.masked_fill(hidden[:, None], float("-inf"))
    return logits.softmax(-1).mean(1)[:, -num_patches:]
