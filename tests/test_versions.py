"""What is older than the floors is refused, and the floors are those of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest

from tokenprune.versions import FLOORS, refuse_older

ROOT = Path(__file__).parents[1]


def test_older_ones_are_refused_by_name() -> None:
    refuse_older()
    refuse_older({"no-such-package": "1.0"})
    with pytest.raises(ImportError, match=r"needs numpy 999\.1 or newer, found .*'numpy>=999\.1'"):
        refuse_older({"numpy": "999.1"})


def test_they_are_what_is_installed_and_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    declared = [*project["dependencies"], *extras]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for package, floor in FLOORS.items():
        asked = [f"{package}>={floor}", f"{package}>={floor.removesuffix('.0')}"]
        assert any(line in declared for line in asked), package
        assert f"{package}=={floor}" in makefile
