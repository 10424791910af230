"""Image folders: one subfolder per class, like torchvision's `ImageFolder`."""

import random
from collections.abc import Sequence
from pathlib import Path

from tokenprune.errors import TokenPruneError

__all__ = ["DataError", "Listing", "read_folder"]

# The suffixes that torchvision's ImageFolder reads.
ENDINGS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

Listing = list[tuple[Path, int]]


class DataError(TokenPruneError, ValueError):
    """Images that cannot be trained on: a missing folder, an empty class, an unreadable file."""


def read_folder(root: Path, held_out: float, seed: int) -> tuple[list[str], Listing, Listing]:
    """The sorted class names; images and class indices to train on; and those to evaluate on.

    Without `train/` and `val/`, `held_out` is the share of each class to evaluate on; all if 1.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(
            f"The image folder {str(root)!r} {what}. Give a folder with train/ and val/, or with "
            "one subfolder per class; leave it out for the digits of scikit-learn."
        )
    train, val = root / "train", root / "val"
    if train.is_dir() and val.is_dir():
        names, others = _classes(train), _classes(val)
        if set(others) != set(names):
            raise DataError(
                f"{str(train)!r} has {len(names)} classes and {str(val)!r} {len(others)}; only "
                f"one of them has {sorted(set(names) ^ set(others))[:5]}. Give both the same ones."
            )
        return names, _images(train, names), _images(val, names)
    if train.is_dir() or val.is_dir():
        missing = val if train.is_dir() else train
        raise DataError(
            f"{str(root)!r} lacks {missing.name}/. Give both train/ and val/, or a folder with one "
            "subfolder per class, which is split."
        )
    names = _classes(root)
    if held_out == 1:
        return names, [], _images(root, names)
    return names, *_split(_images(root, names), names, held_out, seed)


def _classes(folder: Path) -> list[str]:
    hidden = (".", "__")
    names = sorted(
        path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(hidden)
    )
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(
            f"{str(folder)!r} needs one subfolder for each of at least two classes, found {found}. "
            "Add them, or name the folder that has them."
        )
    return names


def _images(folder: Path, names: Sequence[str]) -> Listing:
    listing: Listing = []
    for label, name in enumerate(names):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in ENDINGS)
        if not files:
            raise DataError(
                f"Class {name!r} has no image in {str(folder / name)!r} "
                f"({', '.join(sorted(ENDINGS))}). Add images or remove the folder."
            )
        listing += [(file, label) for file in files]
    return listing


def _split(
    listing: Listing, names: Sequence[str], held_out: float, seed: int
) -> tuple[Listing, Listing]:
    """Hold out a share of every class, at least one image and never all."""
    kept, held = [], []
    for label, name in enumerate(names):
        own = [entry for entry in listing if entry[1] == label]
        if len(own) < 2:
            raise DataError(
                f"Class {name!r} has one image, which cannot be both trained and evaluated on. Add "
                "images, or give train/ and val/."
            )
        count = min(max(round(len(own) * held_out), 1), len(own) - 1)
        chosen = set(random.Random(f"{seed}/{name}").sample(range(len(own)), count))
        kept += [entry for index, entry in enumerate(own) if index not in chosen]
        held += [entry for index, entry in enumerate(own) if index in chosen]
    return kept, held
