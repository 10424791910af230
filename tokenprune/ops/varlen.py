"""Kept sets of different sizes, without padding: the tokens of all images in one row.

Where images keep different numbers of tokens, [B, L, D] is padded up to the longest image. Packed
it is [1, T, D]: the tokens of the first image, then those of the second, and so on. What acts on
each token alone runs on that as on a batch of one image with T tokens; attention runs image by
image. Where all images keep as many, the padded form has no padding, and packed means the same.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Size, Tensor
from torch.nn.functional import scaled_dot_product_attention

from tokenprune.ops.jagged import padded_attention
from tokenprune.ops.kernels.packing import can_place, place_rows
from tokenprune.ops.kernels.selection import can_take_rows, take_rows
from tokenprune.ops.moving import gather_tokens
from tokenprune.private import flash_attention

__all__ = [
    "Lengths",
    "as_packed",
    "as_padded",
    "lengths_of",
    "one_image",
    "pack",
    "packed_attention",
    "take_packed_tokens",
    "unpack",
]

HALVES = (torch.float16, torch.bfloat16)


class Lengths(NamedTuple):
    """Where the tokens of each image are.

    Attributes:
        of_images: How many tokens each image has, prefix tokens included; empty where all have the
            same number.
        batch: B.
        longest: L.
        rows: [T] of each packed token, its place among the B * L padded ones.
        back: [B * L] of each padded place its packed token; of padding, the last of its image.
        starts: [B + 1] where each image starts in the packed row, and T.
    """

    of_images: tuple[int, ...]
    batch: int
    longest: int
    rows: Tensor
    back: Tensor
    starts: Tensor


def lengths_of(
    numbers: Int[Tensor, "B K"],
    counts: Int[Tensor, " B"],
    known: Sequence[int],
    num_prefix: int,
) -> Lengths:
    """How many tokens each image has.

    Args:
        numbers: those of the kept patches, -1 at the end of a row that holds fewer than K.
        counts: how many each row holds.
        known: the same in Python, empty where all hold K.
    """
    batch, most = numbers.shape
    if not known:
        nothing = numbers.new_empty(0)
        return Lengths((), batch, num_prefix + most, nothing, nothing, nothing)
    each = tuple(count + num_prefix for count in known)
    placed = (place_rows if can_place(counts) else places_of)(counts, most, sum(each), num_prefix)
    return Lengths(each, batch, num_prefix + most, *placed)


def places_of(
    counts: Int[Tensor, " B"], longest: int, total: int, num_prefix: int
) -> tuple[Int[Tensor, " T"], Int[Tensor, " B_times_L"], Int[Tensor, " B_plus_1"]]:
    """`rows`, `back` and `starts` of `Lengths`, from how many patches each image keeps."""
    counts = counts + num_prefix
    starts = F.pad(counts.cumsum(0), (1, 0))
    places = torch.arange(num_prefix + longest, device=counts.device)
    rows = (places < counts[:, None]).flatten().nonzero().squeeze(1)
    back = (torch.minimum(places, counts[:, None] - 1) + starts[:-1, None]).flatten()
    return rows, back, starts.to(torch.int32)


def take_packed_tokens(
    tokens: Float[Tensor, "B L D"],
    chosen: Int[Tensor, "B K"],
    counts: Sequence[int],
    num_prefix: int,
    lengths: Lengths,
) -> Float[Tensor, "b T D"]:
    """The prefix tokens and the patches at `chosen`, packed."""
    if not lengths.of_images:
        whole = chosen.shape[1] == tokens.shape[1] - num_prefix
        return tokens if whole else gather_tokens(tokens, chosen, num_prefix)
    if can_take_rows(tokens):
        return take_rows(tokens, chosen, lengths.starts, len(lengths.rows), num_prefix)[None]
    places = torch.cat([torch.arange(num_prefix, device=chosen.device).expand(len(chosen), -1),
                        chosen + num_prefix], dim=1)  # fmt: skip
    places = places + torch.arange(len(chosen), device=chosen.device)[:, None] * tokens.shape[1]
    taken = places.flatten().index_select(0, lengths.rows)
    return tokens.flatten(0, 1).index_select(0, taken).unsqueeze(0)


def pack(x: Shaped[Tensor, "B ..."], lengths: Lengths, dim: int) -> Shaped[Tensor, "b ..."]:
    """A padded tensor, whose dim 0 counts images and `dim` tokens, packed."""
    if not lengths.of_images:
        return x
    flat = x.movedim(dim, 1).flatten(0, 1).index_select(0, lengths.rows)
    return _strided_as(flat.unsqueeze(0).movedim(1, dim), x)


def unpack(x: Shaped[Tensor, "b ..."], lengths: Lengths, dim: int) -> Shaped[Tensor, "B ..."]:
    """A packed tensor padded again. Padding holds the last token of its image."""
    if not lengths.of_images:
        return x
    flat = x.movedim(dim, 1).squeeze(0).index_select(0, lengths.back)
    padded = flat.view(lengths.batch, lengths.longest, *flat.shape[1:])
    return padded if dim == 1 and x.is_contiguous() else _strided_as(padded.movedim(1, dim), x)


def _strided_as(x: Tensor, like: Tensor) -> Tensor:
    """`x` with its dims in the order in which `like` has them in memory: hosts call `view`."""
    strides = like.stride()
    order = sorted(range(like.ndim), key=lambda d: (-strides[d], d))
    back = sorted(range(like.ndim), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def as_packed(x: Tensor, lengths: Lengths, dim: int) -> Tensor:
    """A tensor of the shape that a padded one has when packed, for its shape alone."""
    if not lengths.of_images:
        return x
    return _blank(x, 1, dim, lengths.rows.shape[0])


def as_padded(x: Tensor, lengths: Lengths, dim: int) -> Tensor:
    """A tensor of the shape that a packed one has when padded, for its shape alone."""
    if not lengths.of_images:
        return x
    return _blank(x, lengths.batch, dim, lengths.longest)


def one_image(x: Shaped[Tensor, "B ..."], lengths: Lengths) -> Shaped[Tensor, "b ..."]:
    """Of a tensor whose dim 0 counts images, one, for its shape alone; packed they are one."""
    return x[:1] if lengths.of_images else x


def _blank(x: Tensor, batch: int, dim: int, length: int) -> Tensor:
    shape = [batch, *x.shape[1:]]
    shape[dim] = length
    return x.new_empty(()).expand(Size(shape))


def packed_attention(
    query: Float[Tensor, "... Tq d"],
    key: Float[Tensor, "... Tk d"],
    value: Float[Tensor, "... Tk v"],
    lengths: Lengths,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask: Shaped[Tensor, "B ... L"] | None = None,
) -> Float[Tensor, "... Tq v"]:
    """Scaled dot-product attention of packed tokens, each image's among themselves.

    One kernel for all images on CUDA in half precision, elsewhere one an image. With a mask on CUDA
    tokens are padded: kernels of single images are too small for a card.

    Args:
        mask: of the padded tokens, additive or of booleans; one row of it may serve all queries.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if not lengths.of_images:
        return scaled_dot_product_attention(query, key, value, mask, **options)
    if mask is not None and query.is_cuda:
        return _padded(query, key, value, lengths, mask, **options)
    if mask is None and _at_once_serves(query, key, value):
        return _at_once(query, key, value, lengths, scale)
    parts = [torch.split(x, list(lengths.of_images), dim=-2) for x in (query, key, value)]
    found = [
        scaled_dot_product_attention(q, k, v, _of_image(mask, image, k.shape[-2]), **options)
        for image, (q, k, v) in enumerate(zip(*parts, strict=True))
    ]
    if query.ndim < 4:
        return torch.cat(found, dim=-2)
    return torch.cat([x.transpose(-3, -2) for x in found], dim=-3).transpose(-3, -2)


def _of_image(mask: Tensor | None, image: int, length: int) -> Tensor | None:
    """The mask of one image."""
    return None if mask is None else mask[image : image + 1, ..., :length, :length]


def _padded(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, mask: Tensor, **options: Any
) -> Tensor:
    dim = query.ndim - 2
    query, key, value = (unpack(x, lengths, dim) for x in (query, key, value))
    places = torch.arange(lengths.longest, device=query.device)
    policy = (places < lengths.starts.diff()[:, None]).to(torch.float32)
    given = {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "own_key": True, **options}
    return pack(padded_attention(query, key, value, policy, **given), lengths, dim)


def _at_once_serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `varlen_attn` takes these: it is FlashAttention's kernel."""
    if not (query.is_cuda and query.dtype in HALVES and _has_flash(query.device)):
        return False
    width = query.shape[-1]
    same = query.shape[:-2] == key.shape[:-2] and width == value.shape[-1]
    return same and width % 8 == 0 and width <= 256


def _at_once(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float | None
) -> Tensor:
    heads = [x.flatten(0, -3).transpose(0, 1) for x in (query, key, value)]
    starts, longest = lengths.starts, lengths.longest
    how = (starts, starts, longest, longest, 0.0, False, False)
    out = flash_attention(*heads, *how, scale=scale)[0]
    return out.transpose(0, 1).view(query.shape)  # type: ignore[no-any-return]


@cache
def _has_flash(device: torch.device) -> bool:
    built = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    return built and torch.cuda.get_device_capability(device) >= (8, 0)
