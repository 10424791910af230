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
    same names are replaced one by one, also in folders, the largest after the others and that named
    `last` after all; other files stay, but for those that a pattern of `replaces` names.

    Raises:
        FileExistsError: A file of the target stands where a folder belongs; nothing is replaced.
        IsADirectoryError: The other way round.
    """
    target = target.resolve()
    exists = target.exists()
    parent = target if exists else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".{last}.{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            _flush(file)
        if exists:
            new = {file.name for file in folder.iterdir()}
            old = {file for pattern in replaces for file in target.glob(pattern)}
            files.sort(key=lambda file: (file == folder / last, file.stat().st_size))
            places = [target / file.relative_to(folder) for file in files]
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_dir():
                    raise IsADirectoryError(f"{str(place)!r} is a folder, where a file belongs.")
            for file, place in zip(files, places, strict=True):
                file.replace(place)
            for file in old:
                if file.name not in new and file.is_file():
                    file.unlink()
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
