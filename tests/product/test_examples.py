"""The pages about examples name what is there. `make examples` runs them."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runner() -> Any:
    spec = importlib.util.spec_from_file_location("run_examples", ROOT / "examples/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_row_for_each_example(runner: Any) -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(examples/\S+)` \| (.+) \| \d+ \|$", page, re.MULTILINE)
    files = [*runner.SCRIPTS.values(), runner.HERE / f"{runner.NOTEBOOK}.ipynb"]
    assert [ROOT / file for file, _ in rows] == files
    assert [says for _, says in rows] == [runner.describe(name) for name in runner.NAMES]
    assert len(rows) == 13


def test_the_readme_names_each_file(runner: Any) -> None:
    text = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    for path in runner.SCRIPTS.values():
        named = path.relative_to(runner.HERE)
        assert f"`{named.name if len(named.parts) == 1 else 'distributed/'}`" in text
    for folder in (ROOT / "examples").glob("*/pyproject.toml"):
        assert f"`{folder.parent.name}/`" in text


def test_each_script_can_fail(runner: Any) -> None:
    for path in runner.SCRIPTS.values():
        assert "raise SystemExit(" in path.read_text(encoding="utf-8"), path


def test_what_ends_without_a_word_failed(runner: Any, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert runner.run_script(script) == "ended with -9, and printed nothing"


def test_the_notebook_was_run_whole(runner: Any) -> None:
    text = (runner.HERE / f"{runner.NOTEBOOK}.ipynb").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert '"image/png"' in text
    assert "site-packages" not in text  # a warning, with a path of one machine
    assert len(text) < 200_000
