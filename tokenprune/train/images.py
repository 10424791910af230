"""An image data set whose augmentation depends only on seed, epoch and image.

One random stream in loading order would differ after a resume, with other worker counts and on
other ranks. Here every image of every epoch has its own seed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import PlanError
from tokenprune.train.folders import DataError

__all__ = ["EpochView", "ImageSet"]

_MODES = {1: "L", 3: "RGB"}


class ImageSet(Dataset[dict[str, Any]]):
    """Labelled images, from memory or from files.

    An item is `{"pixel_values": [C, height, width], "labels": int}`.
    """

    def __init__(
        self,
        images: Sequence[Image.Image | Path],
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        *,
        in_chans: int = 3,
        augments: bool = False,
        seed: int = 0,
    ) -> None:
        """Keep images and class indices; files are read on access.

        `augments` says that `transform` is random; `seed` is for the augmentation.
        """
        if in_chans not in _MODES:
            raise PlanError(
                f"Images have 1 or 3 channels, the host takes {in_chans}. Build it with "
                "in_chans=3, or pass your own data set in a DataBundle."
            )
        self.images, self.labels, self.transform = images, list(labels), transform
        self.in_chans, self.augments, self.seed = in_chans, augments, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at(index, epoch=0)

    def at(self, index: int, epoch: int) -> dict[str, Any]:
        """The item with the augmentation of an epoch."""
        image = self.open(index)
        with _seeded(self.seed, epoch, index) if self.augments else nullcontext():
            pixels = self.transform(image)
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def open(self, index: int) -> Image.Image:
        """The image as it is stored, in the host's number of channels."""
        source = self.images[index]
        if isinstance(source, Image.Image):
            return source.convert(_MODES[self.in_chans])
        try:
            with Image.open(source) as image:
                return image.convert(_MODES[self.in_chans])
        except (UnidentifiedImageError, OSError) as error:
            message = f"Cannot read image {source}: {error}. Remove or replace it."
            raise DataError(message) from error


class EpochView(Dataset[Any]):
    """A data set with keys `epoch * len + index`, so that a key also selects the augmentation.

    A data set without the method `at(index, epoch)` gives the same items in every epoch.
    """

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images
        self.size = len(images)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int) -> Any:
        epoch, index = divmod(key, self.size)
        at = getattr(self.images, "at", None)
        return self.images[index] if at is None else at(index, epoch)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed Python, numpy and torch by `numbers`; restore their states afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second = (int(word) for word in np.random.SeedSequence(numbers).generate_state(2))
    random.seed(first)
    np.random.seed(first)
    # the default generator only: torch.manual_seed would reseed the accelerators too
    torch.default_generator.manual_seed(second)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
