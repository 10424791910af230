"""The version of this package, which `pyproject.toml` alone states; and the oldest torch,
transformers and timm that the tests ran with (`make test-oldest`).

Older ones are refused here, when tokenprune is imported: they fail later, from inside of a trace.
"""

import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["DISTRIBUTION", "FLOORS", "refuse_older", "version_of"]

DISTRIBUTION = "tokenprune-torch"
FLOORS = {"torch": "2.8", "transformers": "5.0", "timm": "1.0.22"}


def version_of(distribution: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def refuse_older(floors: dict[str, str] = FLOORS) -> None:
    """Raise if a package that is installed is older than its floor; a newer one just runs.

    Raises:
        ImportError: One is; the message says what to install.
    """
    for package, floor in floors.items():
        found = version_of(package)
        if found is not None and _numbers(found) < _numbers(floor):
            raise ImportError(
                f"tokenprune needs {package} {floor} or newer, found {found}. "
                f"Install it: pip install -U '{package}>={floor}'"
            )


def _numbers(text: str) -> tuple[int, ...]:
    """The release of a version: `2.8.0+cpu` and `2.8` are both (2, 8, 0)."""
    release = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(n) for n in release.group().split(".")] if release else []
    return tuple(numbers + [0] * (3 - len(numbers)))


refuse_older()
