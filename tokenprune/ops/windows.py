"""Windows of a grid: how a host cuts one up, and how whole windows leave and come back.

SparseViT (Chen et al., 2023) drops windows by the norm of what they hold; here any token score is
averaged over each window. `kept` are numbers of windows [B, K], ascending; where K is their number,
every function below moves tokens as the host does, so that nothing changes at all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tokenprune.ops.layout import Layout, flat_tokens, flat_tokens_back
from tokenprune.ops.moving import gather_tokens

__all__ = [
    "Windows",
    "leave_windows",
    "put_windows",
    "relaid_windows",
    "take_windows",
    "to_windows",
    "window_means",
    "window_policy",
    "window_rows",
]


class Windows(NamedTuple):
    """How the tokens of a grid go into windows.

    Attributes:
        grid: H and W of the tokens.
        padding: Empty places at the top, bottom, left and right; fewer than a window is long.
        shift: By how much the grid is rolled, up and to the left.
        rolled_first: It is rolled, then padded.
        size: Height and width of a window.
        strided: A window takes every n-th token instead of neighbours (MaxViT's grids).
    """

    grid: tuple[int, int]
    padding: tuple[int, int, int, int]
    shift: tuple[int, int]
    rolled_first: bool
    size: tuple[int, int]
    strided: bool

    @property
    def across(self) -> tuple[int, int]:
        """Windows from top to bottom and from left to right."""
        top, bottom, left, right = self.padding
        height, width = self.grid[0] + top + bottom, self.grid[1] + left + right
        return height // self.size[0], width // self.size[1]

    @property
    def number(self) -> int:
        """Windows of an image."""
        return self.across[0] * self.across[1]

    @property
    def places(self) -> int:
        """Tokens of a window, empty places included."""
        return self.size[0] * self.size[1]

    @property
    def padded(self) -> bool:
        """Some windows have empty places."""
        return any(self.padding)

    def tokens(self, device: torch.device | None = None) -> Int[Tensor, "n M"]:
        """The number of the token at each place of each window; -1 where it is empty."""
        length = self.grid[0] * self.grid[1]
        numbers = torch.arange(1, length + 1, device=device).reshape(1, *self.grid)
        top, bottom, left, right = self.padding
        back = (-self.shift[0], -self.shift[1])
        if self.rolled_first and any(back):
            numbers = numbers.roll(back, (1, 2))
        if self.padded:
            numbers = F.pad(numbers, (left, right, top, bottom))
        if not self.rolled_first and any(back):
            numbers = numbers.roll(back, (1, 2))
        (down, right), (height, width) = self.across, self.size
        if self.strided:
            cut = numbers.reshape(height, down, width, right).permute(1, 3, 0, 2)
        else:
            cut = numbers.reshape(down, height, right, width).permute(0, 2, 1, 3)
        return cut.reshape(self.number, self.places) - 1


def window_means(scores: Float[Tensor, "B N C"], windows: Windows) -> Float[Tensor, "B n C"]:
    """The mean of what the tokens of each window have; empty places do not count."""
    numbers = windows.tokens(scores.device)
    taken = scores.index_select(1, numbers.clamp_min(0).flatten())
    taken = taken.reshape(scores.shape[0], *numbers.shape, scores.shape[-1])
    if not windows.padded:
        return taken.mean(2)
    real = (numbers >= 0).unsqueeze(-1)
    return torch.where(real, taken, 0.0).sum(2) / real.sum(1)


def window_policy(policy: Float[Tensor, "B n"], windows: Windows) -> Float[Tensor, "B N"]:
    """What is said of windows, for each of their tokens."""
    spread = policy.unsqueeze(-1).expand(-1, -1, windows.places).flatten(1)
    return spread.index_select(1, _places(windows, policy.device))


def _places(windows: Windows, device: torch.device) -> Int[Tensor, " N"]:
    """Where each token is among the places of all windows."""
    numbers, length = windows.tokens(device).flatten(), windows.grid[0] * windows.grid[1]
    numbers = torch.where(numbers < 0, length, numbers)
    places = torch.arange(numbers.shape[0], device=device)
    return places.new_zeros(length + 1).scatter(0, numbers, places)[:length]


def window_rows(kept: Int[Tensor, "B K"], windows: Windows) -> Int[Tensor, "B R"] | None:
    """The numbers of the tokens of the kept windows, -1 at empty places; None if all are kept."""
    if kept.shape[1] == windows.number:
        return None
    numbers = windows.tokens(kept.device)
    count = kept.shape[1] * windows.places
    return numbers.index_select(0, kept.flatten()).reshape(kept.shape[0], count)


def take_windows(
    x: Shaped[Tensor, "..."], rows: Int[Tensor, "B R"] | None, windows: Windows, layout: Layout
) -> Shaped[Tensor, "..."]:
    """The tokens of the kept windows, window by window, in as many dims as `x`, as `take_tokens`
    lays them out; some token at empty places. `x` itself if all are kept."""
    if rows is None:
        return x
    rows = rows.clamp_min(0) if windows.padded else rows
    taken = gather_tokens(flat_tokens(x, layout), rows, 0)
    return flat_tokens_back(taken, layout.gathered(x.shape, rows.shape[1]), layout)


def to_windows(
    x: Shaped[Tensor, "..."],
    rows: Int[Tensor, "B R"] | None,
    windows: Windows,
    layout: Layout,
    inner: tuple[int, ...],
    channels_first: bool,
) -> Shaped[Tensor, "..."]:
    """A row for each window of what `take_windows` returned, or of the whole grid: [B * K, *inner],
    0 at empty places."""
    if rows is None:
        numbers, tokens = windows.tokens(x.device).reshape(1, -1), flat_tokens(x, layout)
        tokens = tokens.index_select(1, numbers.clamp_min(0).flatten())
    else:
        numbers, tokens = rows, flat_tokens(x, _one_row(layout))
    if windows.padded:
        tokens = torch.where((numbers >= 0).unsqueeze(-1), tokens, 0.0)
    batch, count = tokens.shape[0], tokens.shape[1] // windows.places
    target = Layout(count, channels_first)
    return flat_tokens_back(tokens, (batch * count, *inner), target)


def leave_windows(
    x: Shaped[Tensor, "..."],
    rows: Int[Tensor, "B R"] | None,
    windows: Windows,
    channels_first: bool,
    layout: Layout,
    inner: tuple[int, ...],
) -> Shaped[Tensor, "..."]:
    """The tokens of windows [B * K, ...] as `take_windows` lays them out; if all are kept, the grid
    [B, *inner] again."""
    if rows is None:
        tokens = flat_tokens(x, Layout(windows.number, channels_first))
        tokens = tokens.index_select(1, _places(windows, x.device))
        return flat_tokens_back(tokens, _shape(tokens.shape[0], rows, layout, inner), layout)
    tokens = flat_tokens(x, Layout(rows.shape[1] // windows.places, channels_first))
    return flat_tokens_back(tokens, _shape(tokens.shape[0], rows, layout, inner), layout)


def relaid_windows(
    tokens: Shaped[Tensor, "..."],
    rows: Int[Tensor, "B R"] | None,
    was: Layout,
    layout: Layout,
    inner: tuple[int, ...],
) -> Shaped[Tensor, "..."]:
    """The tokens that `take_windows` returned of a tensor laid out as `was`, as it would return
    them of the same tokens in one of shape [B, *inner] and another layout."""
    flat = flat_tokens(tokens, was if rows is None else _one_row(was))
    return flat_tokens_back(flat, _shape(flat.shape[0], rows, layout, inner), layout)


def _shape(
    batch: int, rows: Tensor | None, layout: Layout, inner: tuple[int, ...]
) -> tuple[int, ...]:
    shape = (batch * layout.rows_per_image, *inner)
    return shape if rows is None else layout.gathered(shape, rows.shape[1])


def put_windows(
    x: Float[Tensor, "..."],
    tokens: Float[Tensor, "..."],
    rows: Int[Tensor, "B R"] | None,
    windows: Windows,
    was: Layout,
    layout: Layout,
    inner: tuple[int, ...],
    owned: bool = False,
) -> Float[Tensor, "B ..."]:
    """`x` with the tokens of the kept windows replaced by `tokens`; these themselves if all are.

    Args:
        x: the whole grid, laid out as `was`.
        tokens: as `take_windows` returns them of a tensor [B, *inner] of this layout, which is that
            of the result.
        owned: nobody else reads `x` any more, so it is written to where no gradient is recorded.
    """
    if rows is None:
        return tokens
    dtype = torch.promote_types(x.dtype, tokens.dtype)
    full = flat_tokens(x, was).to(dtype)
    batch, length, width = full.shape
    whole = full.reshape(-1, width)
    new = flat_tokens(tokens, _one_row(layout)).to(dtype).reshape(-1, width)
    places = rows + torch.arange(batch, device=x.device)[:, None] * length
    if windows.padded:
        places = torch.where(rows < 0, batch * length, places)
        whole = F.pad(whole, (0, 0, 0, 1))  # one more row for empty places
    if windows.padded or (owned and not torch.is_grad_enabled()):
        put = whole.index_copy_(0, places.flatten(), new)[: batch * length]
    else:
        put = whole.index_copy(0, places.flatten(), new)
    return flat_tokens_back(
        put.reshape(batch, length, width), _shape(batch, None, layout, inner), layout
    )


def _one_row(layout: Layout) -> Layout:
    return Layout(1, layout.channels_first)  # not _replace(), which torch 2.8 cannot compile
