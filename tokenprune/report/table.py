"""A table as plain data: the terminal and the HTML report show the same one."""

from dataclasses import dataclass

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns.

    Attributes:
        title: One line above it.
        columns: Headings.
        rows: As many texts in each as there are columns. The first column is left aligned, the
            others right.
        note: One line below it.
    """

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
