"""What to train on: scikit-learn's digits, which every install has, or images of your own."""

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
from tokenprune.train.images import Crops, ImageSet, eval_transform, train_transform

__all__ = ["DataBundle", "load_data"]

DIGITS = "digits"
HELD_OUT_DIGITS = 360
HELD_OUT = 0.2  # of each class of a folder that is not divided
# For images of few pixels: a mirrored 2 is no digit, and half of an 8 is a 3.
SMALL_CROPS = Crops(scale=(0.6, 1.0), ratio=(0.85, 1.18), flip=False)
_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """Images to train on, images to evaluate on, and what is known about them.

    Bring your own by making one: any map-style data set of
    `{"pixel_values": [C, height, width], "labels": int}` serves.

    Attributes:
        train: images to train on.
        eval: images that are never trained on.
        class_names: by class index.
        image_size: side in pixels.
        mean: of each channel, subtracted from pixels in [0, 1].
        std: of each channel, what they are then divided by.
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
        spec: None or "digits" for scikit-learn's 1797 digits of 8 x 8 pixels, of which always the
            same 360, stratified, are held out. Otherwise a folder: `train/` and `val/` with one
            subfolder a class; or the classes themselves, of which a share is held out; or idx
            files under MNIST's names, `train-images-idx3-ubyte` and so on, or those with `.gz`.
        image_size: Side in pixels that the host takes; `input_settings` tells it and what follows.
        in_chans: 1 for grey, 3 for colour.
        mean: Of each channel; 0.5 if None.
        std: Of each channel; 0.5 if None.
        crop_pct: Share of the shorter side that evaluation looks at. Digits and idx files are never
            cropped.
        interpolation: Of the resize: `bilinear` or `bicubic`.
        train: What augmentation a recipe asks for; none if None.
        held_out: Share of each class held out of a folder without `val/`; 1 for all of it, to
            evaluate on.
        seed: Of that split and of the augmentation.

    Raises:
        DataError: A missing folder, an empty class, a share outside (0, 1], or another number of
            means than channels.
        PlanError: Neither 1 nor 3 channels.
    """
    if not 0 < held_out <= 1:
        raise DataError(f"held_out must lie in (0, 1], got {held_out}.")
    half = (_HALF,) * in_chans
    look = tuple(mean or half), tuple(std or half)
    if not len(look[0]) == len(look[1]) == in_chans:
        raise DataError(
            f"mean has {len(look[0])} numbers and std {len(look[1])}, but images are to have "
            f"{in_chans} channels. Give one number for each channel."
        )
    config = train or TrainSection()
    if spec is None or spec == DIGITS:
        names, to_train, to_eval = _digits()
        name, crop_pct, crops = DIGITS, 1.0, SMALL_CROPS
    elif is_idx_folder(Path(spec)):
        names, to_train, to_eval = read_idx_folder(Path(spec))
        name, crop_pct, crops = Path(spec).name, 1.0, SMALL_CROPS
    else:
        names, listed, listed_eval = read_folder(Path(spec), held_out, seed)
        to_train, to_eval = _columns(listed), _columns(listed_eval)
        name, crops = Path(spec).name, Crops()
    augment = train_transform(image_size, *look, interpolation, config, crops)
    plain = eval_transform(image_size, *look, crop_pct, interpolation)
    return DataBundle(
        train=ImageSet(*to_train, augment, in_chans=in_chans, augments=True, seed=seed),
        eval=ImageSet(*to_eval, plain, in_chans=in_chans),
        class_names=tuple(names),
        image_size=image_size,
        mean=look[0],
        std=look[1],
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
    # 0 to 16 in the file
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in grey]
    labels = [int(label) for label in digits.target]
    apart = train_test_split(
        range(len(labels)), test_size=HELD_OUT_DIGITS, stratify=labels, random_state=0
    )
    kept, held = ([(images[i], labels[i]) for i in part] for part in apart)
    return [str(name) for name in digits.target_names], _columns(kept), _columns(held)
