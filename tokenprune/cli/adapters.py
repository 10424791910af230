"""`tokenprune adapters`: list the architecture adapters."""

from tokenprune.cli.console import show
from tokenprune.hosts.registry import list_adapters
from tokenprune.report.table import Table

__all__ = ["adapters"]


def adapters() -> None:
    """List the architecture adapters."""
    names = list_adapters()
    rows = []
    for name in names:
        library, _, family = name.rpartition("/")
        rows.append((name, library or "any", family if library else "any with a stack of blocks"))
    show(Table(f"{len(names)} adapters", ("adapter", "library", "family"), tuple(rows)))
