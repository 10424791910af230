"""A table as plain data, for the terminal and the HTML report."""

from dataclasses import dataclass

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns, of which the first is aligned left, the others right; `title` is
    above it, `note` below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"A row of table {self.title!r} has {len(row)} cells, its columns are "
                    f"{len(self.columns)}: {row}."
                )
