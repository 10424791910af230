"""Images in idx files, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.train.folders import DataError

__all__ = ["Labelled", "is_idx_folder", "read_idx_folder"]

Labelled = tuple[list[Image.Image], list[int]]

PARTS = {"train": "to train on", "t10k": "to evaluate on"}
_UNSIGNED_BYTE = 8


def is_idx_folder(root: Path) -> bool:
    """Whether a folder holds idx files with MNIST's names."""
    return any(root.glob("*-images-idx3-ubyte*"))


def read_idx_folder(root: Path) -> tuple[list[str], Labelled, Labelled]:
    """Class names, which are the numbers of the labels; what to train on; what to evaluate on."""
    train, held = (_part(root, part) for part in PARTS)
    classes = max(train[1]) + 1
    beyond = [label for label in held[1] if label >= classes]
    if beyond:
        raise DataError(
            f"{str(root)!r} has the labels 0 to {classes - 1} to train on, but {beyond[0]} to "
            "evaluate on. Give two parts with the same classes."
        )
    return [str(label) for label in range(classes)], train, held


def _part(root: Path, part: str) -> Labelled:
    images = _read(root, f"{part}-images-idx3-ubyte", 3)
    labels = _read(root, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{str(root)!r} has {len(images)} images {PARTS[part]} and {len(labels)} labels. Get "
            "the files again."
        )
    return [Image.fromarray(image) for image in images], labels.tolist()


def _read(root: Path, name: str, rank: int) -> NDArray[np.uint8]:
    """The array in an idx file: two zero bytes, type, rank, sizes (4 bytes each, big-endian)."""
    found = next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)
    if found is None:
        raise DataError(f"{str(root)!r} lacks {name} or {name}.gz. Add one of them.")
    try:
        data = found.read_bytes()
        data = gzip.decompress(data) if found.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {str(found)!r}: {error}. Get the file again.") from error
    header = 4 + 4 * rank
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], dtype=">u4"))
    fits = len(shape) == rank and len(data) == header + math.prod(shape)
    if tuple(data[:4]) != (0, 0, _UNSIGNED_BYTE, rank) or not fits:
        raise DataError(
            f"{str(found)!r} is no idx file of unsigned bytes in {rank} dims, or was cut off. Get "
            "the file again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
