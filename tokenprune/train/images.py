"""An image data set whose augmentation depends only on seed, epoch and image.

One random stream in loading order would differ after a resume, with other worker counts and on
other ranks. Here every image of every epoch has its own seed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tokenprune.errors import PlanError
from tokenprune.recipe.schema import TrainSection
from tokenprune.train.folders import DataError

__all__ = ["Crops", "EpochView", "ImageSet", "eval_transform", "train_transform"]

Transform = Callable[[Image.Image], Tensor]
_MODES = {1: "L", 3: "RGB"}


class ImageSet(Dataset[dict[str, Any]]):
    """Labelled images, from memory or from files.

    An item is `{"pixel_values": [C, height, width], "labels": int}`.
    """

    def __init__(
        self,
        images: Sequence[Image.Image | Path],
        labels: Sequence[int],
        transform: Transform,
        *,
        in_chans: int = 3,
        augments: bool = False,
        seed: int = 0,
    ) -> None:
        """Keep the images; files are read on access.

        Args:
            images: in memory, or paths.
            labels: class index of each.
            transform: from an image to a tensor.
            in_chans: 1 for grey, 3 for colour.
            augments: `transform` is random.
            seed: of the augmentation.

        Raises:
            PlanError: `in_chans` is neither 1 nor 3.
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
        """The item with the augmentation of an epoch.

        Raises:
            DataError: The file is not an image.
        """
        image = self.open(index)
        if self.augments:
            with _seeded(self.seed, epoch, index):
                pixels = self.transform(image)
        else:
            pixels = self.transform(image)
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def open(self, index: int) -> Image.Image:
        """The image as it is stored, in the host's number of channels.

        Raises:
            DataError: The file is not an image.
        """
        source = self.images[index]
        if isinstance(source, Image.Image):
            return source.convert(_MODES[self.in_chans])
        try:
            with Image.open(source) as image:
                return image.convert(_MODES[self.in_chans])
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"Cannot read image {source}: {error}. Remove or replace it."
            ) from error


@dataclass(frozen=True)
class Crops:
    """Limits of random crops; the defaults are ImageNet's.

    Attributes:
        scale: share of the area that a crop has.
        ratio: width over height of a crop.
        flip: mirror half of the images.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


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


def eval_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float,
    interpolation: str,
) -> Transform:
    """Resize so that `crop_pct` of the shorter side is `image_size` pixels, crop the centre."""
    from timm.data import create_transform

    transform: Transform = create_transform(
        image_size, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation
    )
    return transform


def train_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    config: TrainSection,
    crops: Crops,
) -> Transform:
    """A random crop, and the augmentation of a recipe's `train` section.

    Args:
        image_size: side in pixels.
        mean: of each channel.
        std: of each channel.
        interpolation: of the resize.
        config: the recipe's section.
        crops: used where the recipe gives no `crop_scale`.
    """
    from timm.data import create_transform

    transform: Transform = create_transform(
        image_size,
        is_training=True,
        mean=mean,
        std=std,
        interpolation=interpolation,
        scale=config.crop_scale or crops.scale,
        ratio=crops.ratio,
        hflip=0.5 if crops.flip else 0.0,
        color_jitter=config.color_jitter,
        auto_augment=config.rand_augment,
        re_prob=config.random_erasing,
        re_mode="pixel",
    )
    return transform


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
