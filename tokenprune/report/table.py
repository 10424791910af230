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

    def __str__(self) -> str:
        """Plain text."""
        lines = [self.columns, *self.rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        drawn = [self.title]
        for first, *rest in lines:
            cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
            drawn.append("  ".join([first.ljust(widths[0]), *cells]))
        return "\n".join([*drawn, *([self.note] if self.note else [])])
