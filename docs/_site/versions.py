"""The page of supported versions, from `pyproject.toml` and `constraints.txt`."""

import re
import tomllib
from pathlib import Path

__all__ = ["page"]

HEAD = """# Supported versions

Version {version} of `tokenprune-torch`, for Python {python}. The column *oldest* is what
`pyproject.toml` allows; `make test-oldest` builds that of torch, timm and transformers. *Tested* is
what `make` installs from `constraints.txt`.

| package | needed by | oldest | tested |
|---|---|---|---|
"""
TAIL = """
An older torch, transformers or timm is refused when tokenprune is imported, with the command that
installs a newer one. What changes between versions of tokenprune is in the
[changelog](changelog.md).
"""
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[.*\])?(?P<bound>[<>=!~].*)?")


def page(root: Path) -> str:
    """The page as Markdown."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = _tested(root / "constraints.txt")
    groups = {"tokenprune": project["dependencies"]}
    groups |= {f"[{name}]": needed for name, needed in project["optional-dependencies"].items()}
    rows: dict[str, tuple[str, list[str]]] = {}
    for group, requirements in groups.items():
        for requirement in requirements:
            match = REQUIREMENT.fullmatch(requirement)
            if match is None:
                raise ValueError(f"{requirement!r} in pyproject.toml is no requirement")
            if match["name"] == project["name"]:
                continue
            bound, users = rows.setdefault(match["name"], (match["bound"] or "", []))
            users.append(group)
            rows[match["name"]] = (bound or match["bound"] or "", users)
    lines = [
        f"| {name} | {', '.join(users)} | {bound.removeprefix('>=')} | {tested[_plain(name)]} |"
        for name, (bound, users) in sorted(rows.items())
    ]
    python = project["requires-python"].removeprefix(">=") + " and newer"
    return HEAD.format(version=project["version"], python=python) + "\n".join(lines) + "\n" + TAIL


def _tested(constraints: Path) -> dict[str, str]:
    pins = re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    return {_plain(name): version for name, version in pins}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
