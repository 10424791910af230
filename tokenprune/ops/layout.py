"""How a tensor holds the tokens of each image: in rows, on a grid, channels first or last."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor

__all__ = ["TOKENS", "Layout", "flat_tokens", "flat_tokens_back", "laid_out"]


class Layout(NamedTuple):
    """How a tensor holds the L tokens of each image, D channels each.

    Attributes:
        rows_per_image: Rows of dim 0 per image: 1, or as many as the windows or pixels that a host
            counts there too.
        channels_first: [B, D, ...] instead of [B, ..., D].
    """

    rows_per_image: int = 1
    channels_first: bool = False

    def gathered(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """The shape of `take_tokens`: every dim that counts tokens is 1 but one, which is K."""
        batch, inner = shape[0] // self.rows_per_image, (1,) * (len(shape) - 3) + (count,)
        if self.channels_first:
            return (batch, shape[1], *inner)
        return (batch, *inner, shape[-1])


TOKENS = Layout()


def flat_tokens(x: Shaped[Tensor, "..."], layout: Layout = TOKENS) -> Shaped[Tensor, "B L D"]:
    """[B, L, D] tokens of a grid, row by row; [B, L, D] is returned as it is."""
    if layout.channels_first:
        x = x.flatten(2).transpose(1, 2)
    length = layout.rows_per_image * math.prod(x.shape[1:-1])  # not -1: there may be no image
    return x.reshape(x.shape[0] // layout.rows_per_image, length, x.shape[-1])


def flat_tokens_back(
    tokens: Shaped[Tensor, "B L D"], shape: tuple[int, ...], layout: Layout
) -> Shaped[Tensor, "..."]:
    """The tokens of `flat_tokens` in a shape of this layout."""
    if layout.channels_first:
        tokens = tokens.reshape(shape[0], math.prod(shape[2:]), shape[1]).transpose(1, 2)
    return tokens.reshape(shape)


def laid_out(
    tokens: Shaped[Tensor, "B M D"],
    flat: Shaped[Tensor, "B L D"],
    given: Shaped[Tensor, "..."],
    like: Shaped[Tensor, "..."],
    layout: Layout,
) -> Shaped[Tensor, "..."]:
    """Tokens on the grid of `like`; all in one row of it where they are fewer than it has.

    `flat` are the tokens of `given`, by `flat_tokens`: if `tokens` are these very ones, `given` is
    what is returned, so that nothing changes at all where no token has left.
    """
    if tokens is flat:
        return given
    places = like.shape[2:] if layout.channels_first else like.shape[1:-1]
    whole = tokens.shape[1] == layout.rows_per_image * math.prod(places)
    shape = tuple(like.shape) if whole else layout.gathered(like.shape, tokens.shape[1])
    return flat_tokens_back(tokens, shape, layout)
