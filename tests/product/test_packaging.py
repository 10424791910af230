"""The wheel holds everything and works outside the tree; so does the editable install."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenprune

ROOT = Path(__file__).parents[2]
FOLDERS_AT_THE_TOP = {"tokenprune.adapters": "adapters", "tokenprune.recipes": "recipes"}

LOOK_AROUND = """
import pathlib, tokenprune, tokenprune.adapters
from tokenprune.recipe import load_recipe
print(pathlib.Path(tokenprune.__file__).parent.parent)
print(pathlib.Path(tokenprune.adapters.__file__).resolve().parent.parent)
print(*(load_recipe(name).name for name in tokenprune.list_recipes()))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of a copy of the tracked tree, so that no build folder is left behind; and a wheel
    that is built from the sdist alone."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE", "tokenprune", "adapters", "recipes"):
        copy(ROOT / name, source / name)
    build = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, sdist]
    run(*command, cwd=folder)
    (built,) = folder.glob("*.whl")
    return sdist, built


@pytest.fixture(scope="module")
def wheel(archives: tuple[Path, Path]) -> Path:
    return archives[1]


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and its requirements from the one that runs the tests. The
    source tree and its editable install are not on its path."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    options = ["--no-deps", "--no-index", "--quiet"]
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "requirements.pth").write_text("\n".join(others) + "\n")
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder without caches and without the links that `make links` draws."""
    if source.is_symlink() or source.name == "__pycache__":
        return
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    target.mkdir()
    for child in source.iterdir():
        copy(child, target / child.name)


def test_every_package_of_the_tree_is_listed(settings: dict[str, Any]) -> None:
    setuptools = settings["tool"]["setuptools"]
    inits = [path.parent.relative_to(ROOT) for path in (ROOT / "tokenprune").rglob("__init__.py")]
    found = {".".join(folder.parts) for folder in inits} | set(FOLDERS_AT_THE_TOP)
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == FOLDERS_AT_THE_TOP
    assert len(setuptools["packages"]) == len(found)


def test_names_of_the_distribution(settings: dict[str, Any]) -> None:
    project = settings["project"]
    assert project["name"] == "tokenprune-torch"
    assert project["requires-python"] == ">=3.11"
    assert project["scripts"] == {"tokenprune": "tokenprune.cli:main"}


def test_the_core_imports_runtime_dependencies_only(settings: dict[str, Any]) -> None:
    requirements = settings["project"]["dependencies"]
    names = {requirement.split(">")[0] for requirement in requirements}
    brought_along = {"yaml", "pydantic_core", "triton"}  # by pyyaml, pydantic, torch with CUDA
    allowed = {"tokenprune", *sys.stdlib_module_names, *names, *brought_along}
    checked = 0
    for path in (ROOT / "tokenprune").rglob("*.py"):
        if path.relative_to(ROOT).parts[1] in {"cli", "models", "report", "train"}:
            continue  # these need an extra, and say so
        checked += 1
        imported = set(imports_on_load(path))
        assert imported <= allowed, f"{path.name} imports {sorted(imported - allowed)}"
    assert checked > 5


def imports_on_load(path: Path) -> Iterator[str]:
    """Top-level names of the modules that a file imports outside any function or `if`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


def test_wheel_holds_adapters_recipes_and_the_typing_marker(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    assert "tokenprune/py.typed" in files
    assert "tokenprune/recipes/dynamicvit-deit-small-k0.7.yaml" in files
    for folder, pattern in (("tokenprune", "*.py"), ("adapters", "*.py"), ("recipes", "*.yaml")):
        for path in (ROOT / folder).rglob(pattern):
            inside = path.relative_to(ROOT).as_posix()
            assert (inside if folder == "tokenprune" else f"tokenprune/{inside}") in files
    assert not [name for name in files if name.startswith(("adapters/", "recipes/", "tests/"))]


def test_the_sdist_has_everything_to_build(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tokenprune/py.typed"} <= names
    assert {"adapters/generic.py", "recipes/fashion-mnist-k0.7.yaml"} <= names


def test_the_wheel_works_in_a_clean_environment(clean: Path, settings: dict[str, Any]) -> None:
    version, python = settings["project"]["version"], clean / "bin" / "python"
    core, adapters, names = run(python, "-c", LOOK_AROUND, cwd=clean).splitlines()
    (site,) = clean.glob("lib/python*/site-packages")
    assert Path(core) == site
    assert Path(adapters) == site / "tokenprune"
    shipped = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert names.split()[: len(shipped)] == shipped
    shown = run(clean / "bin" / "tokenprune", "--version", cwd=clean)
    assert shown == f"tokenprune {version}\n"


def test_editable_install_works_outside_the_tree(tmp_path: Path) -> None:
    core, adapters, names = run(sys.executable, "-c", LOOK_AROUND, cwd=tmp_path).splitlines()
    assert Path(core) == ROOT
    assert Path(adapters) == ROOT
    shipped = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert names.split()[: len(shipped)] == shipped


def test_adapters_is_not_importable_twice() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tokenprune.adapters, adapters"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert re.search(r"ImportError: .*import.*tokenprune\.adapters", done.stderr, re.IGNORECASE)


def test_other_files_say_the_same_version(settings: dict[str, Any]) -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {settings['project']['version']}\n" in cited
    assert tokenprune.__version__ == settings["project"]["version"]
    named = re.findall(r"\]\(([^)#]+)\)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_issue_templates_ask_for_what_there_is() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "host"]
    for form in forms[::2]:
        read = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= read.keys()
        assert any("`tokenprune env`" in part["attributes"]["label"] for part in read["body"])
