"""Kept sets whose size differs between images, as rows that end in padding.

The numbers of an image's kept tokens are a row of [B, K]: its own first, ascending, then -1 up to
the longest row of the batch. So a row says by itself which of its places hold a token. `counts`
says how many each row has; it is empty where all have K. It is known to Python, so that only the
stage that chose the tokens waits for a GPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenprune.ops.align import dropped_along
from tokenprune.ops.attention import masked_attention
from tokenprune.ops.moving import gather_aligned, gather_table, gather_tokens, put_back

__all__ = [
    "blank_padding",
    "filled",
    "gather_table_jagged",
    "kept_policy",
    "padded_attention",
    "put_back_jagged",
    "take_chosen",
]


def kept_policy(
    numbers: Int[Tensor, "B K"], counts: Sequence[int], num_prefix: int, rows_per_image: int = 1
) -> Float[Tensor, "Bf L"] | None:
    """1 at prefix tokens and kept patches, 0 at padding; None where there is no padding."""
    if not counts:
        return None
    return _policy(numbers, num_prefix).repeat_interleave(rows_per_image, 0)


def _policy(numbers: Tensor, num_prefix: int) -> Tensor:
    policy = torch.cat([numbers.new_zeros(numbers.shape[0], num_prefix), numbers], dim=1) >= 0
    return policy.to(torch.float32)


def padded_attention(
    query: Float[Tensor, "..."],
    key: Float[Tensor, "..."],
    value: Float[Tensor, "..."],
    policy: Float[Tensor, "B L"] | None,
    **options: Any,
) -> Float[Tensor, "..."]:
    """`masked_attention` where the hidden keys are padding, which holds nothing harmful.

    Without a mask of the host's every row sees the kept keys, one at least, so a plain mask over
    the keys will do: the kernel runs at its own speed. Padded rows then hold something else than
    with `masked_attention`; nobody reads them.
    """
    plain = options.get("attn_mask") is None and not options.get("is_causal")
    if policy is None or not plain or policy.shape[0] != key.shape[0]:
        return masked_attention(query, key, value, policy, **options)
    batch, length = policy.shape
    visible = (policy > 0).reshape(batch, *[1] * (query.ndim - 2), length)
    given = {name: options[name] for name in ("dropout_p", "scale", "enable_gqa")}
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, **given)


def take_chosen(
    tokens: Float[Tensor, "B L D"],
    chosen: Int[Tensor, "B K"],
    counts: Sequence[int],
    num_prefix: int,
) -> Float[Tensor, "B P_plus_K D"]:
    """The prefix tokens and the patches at `chosen`; the tokens themselves if all are.

    A padded row holds some patch of the same image.
    """
    if chosen.shape[1] == tokens.shape[1] - num_prefix and not counts:
        return tokens
    return gather_tokens(tokens, chosen.clamp_min(0), num_prefix)


def gather_table_jagged(
    table: Shaped[Tensor, "..."],
    numbers: Int[Tensor, "B K"],
    dims: tuple[int, ...],
    prefix: tuple[int, ...],
    rank: int,
    rows_per_image: int,
    counts: Sequence[int],
) -> Shaped[Tensor, "..."]:
    """`gather_aligned` of rows with padding; the table itself if every token of all is kept."""
    if not counts:
        return gather_table(table, numbers, dims, prefix, rank, rows_per_image)
    kept = numbers.clamp_min(0).repeat_interleave(rows_per_image, 0)
    return gather_aligned(table, kept, dims, prefix, rank)


def put_back_jagged(
    full: Float[Tensor, "B L D"],
    tokens: Float[Tensor, "B M D"],
    numbers: Int[Tensor, "B K"],
    num_prefix: int,
    counts: Sequence[int],
) -> Float[Tensor, "B L D"]:
    """`put_back` of rows with padding, which goes nowhere; `counts` is empty if no row has any."""
    if not counts:
        return put_back(full, tokens, numbers, num_prefix)
    wide = torch.cat([full, full[:, :1]], dim=1)  # padding goes to one more place at the end
    places = torch.where(numbers < 0, full.shape[1] - num_prefix, numbers)
    return put_back(wide, tokens, places, num_prefix)[:, :-1]


def blank_padding(
    x: Float[Tensor, "B ..."], numbers: Int[Tensor, "B K"], num_prefix: int, dim: int
) -> Float[Tensor, "B ..."]:
    """`x` with 0 in the rows along `dim` that are padding."""
    return x.masked_fill(dropped_along(_policy(numbers, num_prefix), x.ndim, dim), 0.0)


def filled(x: Shaped[Tensor, "B ..."], sizes: Sequence[int]) -> Shaped[Tensor, "B ..."]:
    """`x` made as long as `sizes` say, along all dims but the first, with 0."""
    more = [max(size - has, 0) for size, has in zip(sizes, x.shape[1:], strict=True)]
    return F.pad(x, [n for extra in reversed(more) for n in (0, extra)]) if any(more) else x
