"""`tokenprune adapters`: who describes which hosts."""

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
        rows.append((name, library or "any", family if library else "found by looking at the host"))
    show(Table(f"{len(names)} adapters", ("adapter", "library", "family"), tuple(rows)))
