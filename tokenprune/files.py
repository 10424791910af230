"""Write a folder, or files into one, so that a crash leaves no half of it."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(target: Path, last: str, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder, whose files are moved into the folder `target` if the block succeeds.

    A `target` that does not exist appears with all files at once. In one that exists, files of the
    same names are replaced one by one, that named `last` after all others, and other files stay,
    but for those that a pattern of `replaces` names.
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
            if file.is_file():
                _flush(file)
        if exists:
            new = {file.name for file in folder.iterdir()}
            old = {file for pattern in replaces for file in target.glob(pattern)}
            for file in sorted(folder.iterdir(), key=lambda file: file.name == last):
                file.replace(target / file.name)
            for file in old:
                if file.name not in new:
                    file.unlink()
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
