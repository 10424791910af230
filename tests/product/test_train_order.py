"""Every image once an epoch, in an order that neither a resume nor other processes change."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.errors import PlanError
from tokenprune.train.order import EpochBatches, steps_per_epoch


def steps(num_images: int, batch_size: int, parts: tuple[int, int], epoch: int) -> list[list[int]]:
    """Keys of each optimiser step, over all ranks."""
    accumulation, ranks = parts
    shares = []
    for rank in range(ranks):
        order = EpochBatches(
            num_images, batch_size, accumulation_steps=accumulation, rank=rank, num_ranks=ranks
        )
        order.epoch = epoch
        shares.append(list(order))
        assert len(order) == len(shares[-1])
    together = []
    for first in range(0, len(shares[0]), accumulation):
        passes = range(first, first + accumulation)
        together.append([key for p in passes for share in shares for key in share[p]])
    return together


counts = st.integers(1, 3)


@given(
    num_images=st.integers(1, 40),
    share=st.integers(1, 5),
    accumulation=counts,
    ranks=counts,
    epoch=st.integers(0, 3),
)
def test_a_step_takes_the_same_images_however_it_is_dealt_out(
    num_images: int, share: int, accumulation: int, ranks: int, epoch: int
) -> None:
    batch_size = share * accumulation * ranks
    alone = steps(num_images, batch_size, (1, 1), epoch)
    dealt = steps(num_images, batch_size, (accumulation, ranks), epoch)

    first = epoch * num_images
    assert sorted(chain(*alone)) == list(range(first, first + num_images))
    assert len(alone) == len(dealt) == steps_per_epoch(num_images, batch_size)
    for whole, parts in zip(alone, dealt, strict=True):
        assert parts[: len(whole)] == whole
        # what fills up the last step, so that every part has as many images
        assert len(parts) - len(whole) < accumulation * ranks
        assert set(parts) <= set(chain(*alone))


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = EpochBatches(50, 50, seed=seed)
        batches.epoch = epoch
        return [key - epoch * 50 for key in next(iter(batches))]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    with pytest.raises(PlanError, match=r"10 images .* to 2 processes with 3 .* multiple of 6\."):
        EpochBatches(50, 10, accumulation_steps=3, num_ranks=2)
