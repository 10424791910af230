"""Write a folder, or files into one, so that a crash leaves no half of it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(target: Path, last: str) -> Iterator[Path]:
    """A new folder, whose files are moved into the folder `target` if the block succeeds.

    A `target` that does not exist appears with all files at once. In one that exists, files of the
    same names are replaced one by one, that named `last` after all others, and other files stay.
    """
    target = target.resolve()
    exists = target.exists()
    parent = target if exists else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".{last}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        for file in folder.iterdir():
            _flush(file)
        if exists:
            for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
                file.replace(target / file.name)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
