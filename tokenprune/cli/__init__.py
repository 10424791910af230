"""The command line `tokenprune`."""

import sys

from tokenprune.errors import MissingDependencyError

__all__ = ["main"]


def main() -> None:
    """Entry point of the command `tokenprune`."""
    try:
        from tokenprune.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        missing = MissingDependencyError(
            f"The command line needs {error.name}, which is not installed. "
            "Run: pip install 'tokenprune-torch[cli]'"
        )
        print(f"error: {missing}", file=sys.stderr)
        raise SystemExit(2) from None
    app()
