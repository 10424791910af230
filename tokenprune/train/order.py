"""The images of each step on each rank, as a function of seed and epoch only.

The images of a step are the same for any number of processes and accumulation steps, and a resumed
run skips the steps that are done.
"""

from collections.abc import Iterator
from itertools import cycle, islice

import torch
from torch.utils.data import Sampler

from tokenprune.errors import PlanError

__all__ = ["EpochBatches", "steps_per_epoch"]


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimiser steps of one pass over the images; the last may hold fewer."""
    return -(-num_images // batch_size)


class EpochBatches(Sampler[list[int]]):
    """Batch sampler of one rank. Yields keys of `EpochView`: `epoch * num_images + index`.

    Every epoch is shuffled and cut into steps of `batch_size` images; a step is divided equally
    among the ranks and their accumulation steps. A last step that cannot be divided is filled up
    with images from the start of the epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        accumulation_steps: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
    ) -> None:
        """Fix the order of all epochs."""
        parts = accumulation_steps * num_ranks
        if batch_size % parts:
            raise PlanError(
                f"A batch of {batch_size} images cannot be divided evenly to {num_ranks} "
                f"processes with {accumulation_steps} accumulation steps. Take a multiple of "
                f"{parts}."
            )
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.accumulation_steps, self.parts = accumulation_steps, parts
        self.rank, self.num_ranks = rank, num_ranks
        self.epoch = 0

    def __len__(self) -> int:
        return steps_per_epoch(self.num_images, self.batch_size) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        # one stream for all epochs would have to be drawn from its start after a resume
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(self.num_images, generator=generator)
        keys: list[int] = (order + epoch * self.num_images).tolist()
        for first in range(0, len(keys), self.batch_size):
            step = keys[first : first + self.batch_size]
            step += islice(cycle(keys), -len(step) % self.parts)
            share = len(step) // self.parts
            # accumulation step by accumulation step, and in each of them rank by rank
            for part in range(self.rank, self.parts, self.num_ranks):
                yield step[part * share : (part + 1) * share]
