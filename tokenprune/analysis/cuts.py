"""How a grid was cut into windows, read off which token went where."""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from tokenprune.ops.windows import Windows

__all__ = ["cut_of"]


def cut_of(table: Tensor, length: int, sizes: Sequence[tuple[int, int]]) -> Windows | None:
    """The cut that makes a table; None if none does.

    Args:
        table: [n, M] the number of the token at each place of each window, from 1; 0 where it is
            empty.
        length: N, the number of tokens.
        sizes: Heights and widths that the grid may have; any if there are none.
    """
    count, places = table.shape
    grids = sizes or list(_factors(length))
    for grid, size, across in product(grids, _factors(places), _factors(count)):
        spare = [across[d] * size[d] - grid[d] for d in range(2)]
        if any(not 0 <= spare[d] < size[d] for d in range(2)):
            continue
        for strided in (False, True):
            found = _fitted(table, grid, size, across, spare, strided)
            if found is not None:
                return found
    return None


def _factors(number: int) -> Iterator[tuple[int, int]]:
    """Pairs whose product is a number, the squarest first."""
    pairs = [(d, number // d) for d in range(1, number + 1) if number % d == 0]
    return iter(sorted(pairs, key=lambda pair: abs(pair[0] - pair[1])))


def _fitted(
    table: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    across: tuple[int, int],
    spare: list[int],
    strided: bool,
) -> Windows | None:
    """The cut with these sizes, whatever the padding and the shift."""
    (down, right), (height, width) = across, size
    if strided:
        whole = table.reshape(down, right, height, width).permute(2, 0, 3, 1)
    else:
        whole = table.reshape(down, right, height, width).permute(0, 2, 1, 3)
    first = (whole.reshape(down * height, right * width) == 1).nonzero()
    row, column = (int(place) for place in first[0])
    for above, left, rolled_first in product((0, spare[0] // 2), (0, spare[1] // 2), (True, False)):
        padding = (above, spare[0] - above, left, spare[1] - left)
        over = grid if rolled_first else (down * height, right * width)
        shift = ((above - row) % over[0], (left - column) % over[1])
        found = Windows(grid, padding, shift, rolled_first, size, strided)
        if torch.equal(found.tokens(table.device), table - 1):
            return found
    return None
