"""Training data: scikit-learn's digits, image folders or idx files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, tensor
from torch.utils.data import Dataset

from tokenprune.recipe.schema import TrainSection
from tokenprune.train.folders import DataError, read_folder
from tokenprune.train.idx import is_idx_folder, read_idx_folder
from tokenprune.train.images import ImageSet

__all__ = ["DataBundle", "load_data"]

DIGITS = "digits"
HELD_OUT_DIGITS = 360
HELD_OUT = 0.2  # of each class, where a folder has no val/
# For digits: mirroring and small crops would change the class. Folders get ImageNet's crops.
SMALL_CROPS = {"scale": (0.6, 1.0), "ratio": (0.85, 1.18), "hflip": 0.0}
_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """Images to train on, images to evaluate on, and their metadata.

    Both may be any map-style data set of `{"pixel_values": [C, height, width], "labels": int}`.

    Attributes:
        train: images to train on.
        eval: images that are never trained on.
        class_names: by class index.
        image_size: side in pixels.
        mean: of each channel, subtracted from pixels in [0, 1].
        std: of each channel; pixels are divided by it afterwards.
        name: for messages and reports.
    """

    train: Dataset[Any]
    eval: Dataset[Any]
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...] = (_HALF, _HALF, _HALF)
    std: tuple[float, ...] = (_HALF, _HALF, _HALF)
    name: str = ""

    @property
    def num_classes(self) -> int:
        """How many outputs the host's head must have."""
        return len(self.class_names)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def to_pixels(self, normalised: Tensor) -> Tensor:
        """Undo the normalisation: [..., C, height, width] back to pixels in [0, 1]."""
        shape = (self.in_chans, 1, 1)
        mean, std = (tensor(v).to(normalised).view(shape) for v in (self.mean, self.std))
        return (normalised * std + mean).clamp(0, 1)


def load_data(
    spec: str | os.PathLike[str] | None,
    image_size: int,
    *,
    in_chans: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    train: TrainSection | None = None,
    held_out: float = HELD_OUT,
    seed: int = 0,
) -> DataBundle:
    """Read images; the number of classes comes from them.

    Args:
        spec: None or "digits" for scikit-learn's 1797 digits of 8 x 8 pixels, of which the same
            360, stratified, are always held out. Otherwise a folder: `train/` and `val/` with one
            subfolder per class; or the class folders, a share of which is held out; or idx files
            with MNIST's names, `train-images-idx3-ubyte` and so on, with or without `.gz`.
        image_size: Side in pixels; `input_settings` returns it and the next five.
        in_chans: 1 for grey, 3 for colour.
        mean: Of each channel; 0.5 if None.
        std: Of each channel; 0.5 if None.
        crop_pct: Share of the shorter side that evaluation keeps. Digits and idx files are not
            cropped.
        interpolation: Of the resize: `bilinear` or `bicubic`.
        train: The augmentation of a recipe; none if None.
        held_out: Share of each class held out of a folder without `val/`; 1 to evaluate on all.
        seed: Of the split and the augmentation.

    Raises:
        DataError: A missing folder, an empty class, a share outside (0, 1], or another number of
            means than channels.
        PlanError: Neither 1 nor 3 channels.
    """
    from timm.data import create_transform

    if not 0 < held_out <= 1:
        raise DataError(f"held_out must lie in (0, 1], got {held_out}. Give 0.2, say.")
    half = (_HALF,) * in_chans
    mean, std = tuple(mean or half), tuple(std or half)
    if not len(mean) == len(std) == in_chans:
        raise DataError(
            f"mean has {len(mean)} numbers and std {len(std)}, but images are to have {in_chans} "
            "channels. Give one number for each channel."
        )
    crops: dict[str, Any] = SMALL_CROPS
    if spec is None or spec == DIGITS:
        names, to_train, to_eval = _digits()
        name, crop_pct = DIGITS, 1.0
    elif is_idx_folder(Path(spec)):
        names, to_train, to_eval = read_idx_folder(Path(spec))
        name, crop_pct = Path(spec).name, 1.0
    else:
        names, *listings = read_folder(Path(spec), held_out, seed)
        to_train, to_eval = map(_columns, listings)
        name, crops = Path(spec).name, {}
    config = train or TrainSection()
    if config.crop_scale:
        crops = crops | {"scale": config.crop_scale}
    shared = {"mean": mean, "std": std, "interpolation": interpolation}
    plain = create_transform(image_size, crop_pct=crop_pct, **shared)
    augment = create_transform(
        image_size,
        is_training=True,
        color_jitter=config.color_jitter,
        auto_augment=config.rand_augment,
        re_prob=config.random_erasing,
        re_mode="pixel",
        **crops,
        **shared,
    )
    return DataBundle(
        train=ImageSet(*to_train, augment, in_chans=in_chans, augments=True, seed=seed),
        eval=ImageSet(*to_eval, plain, in_chans=in_chans),
        class_names=tuple(names),
        image_size=image_size,
        mean=mean,
        std=std,
        name=name,
    )


def _columns(listing: list[tuple[Any, int]]) -> tuple[list[Any], list[int]]:
    return [image for image, _ in listing], [label for _, label in listing]


def _digits() -> tuple[list[str], tuple[list[Any], list[int]], tuple[list[Any], list[int]]]:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # values in the file are 0 to 16
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images, labels = [Image.fromarray(image) for image in grey], digits.target.tolist()
    images, held_images, labels, held_labels = train_test_split(
        images, labels, test_size=HELD_OUT_DIGITS, stratify=labels, random_state=0
    )
    return [str(name) for name in digits.target_names], (images, labels), (held_images, held_labels)
