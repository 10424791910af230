"""Pages that are made from the code: nothing is left out."""

import sys
import tomllib
from pathlib import Path

import pytest

import tokenprune
from tests.docs.blocks import blocks_of
from tests.test_errors import CASES
from tokenprune import errors

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that make the pages."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "_site")
    for name in ("messages", "reference", "versions"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_every_error_class_has_its_messages() -> None:
    import messages

    page = messages.page(ROOT)
    raised = {kind.__name__ for kind, *_ in CASES}
    assert {name for name in raised if f"\n## {name}\n" not in page} == set()
    # a text in one piece, one in several, one that a constant holds, one with a place for a value
    for words in ("has no middle", "is wrapped already", "feature extractor of", "… ratios, but"):
        assert words in page
    assert len(page.splitlines()) > 200


def test_every_warning_is_explained() -> None:
    import messages

    explained = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    given = [m.text.partition(":")[0] for m in messages._messages(ROOT) if m.kind == "Warnings"]
    names = {name.partition(messages.HOLE)[0].strip(" '") for name in given}
    assert {name for name in names if f"`{name}`" not in explained} == set()
    assert "untrained predictors" in names


def test_every_public_name_is_in_the_reference() -> None:
    import reference

    page = "\n".join(make(ROOT) for make in reference.PAGES.values())
    names = set(tokenprune.__all__) - {"errors", "losses", "methods"}
    shown = [f"tokenprune.{name}" for name in names]
    shown += [f"tokenprune.losses.{name}" for name in tokenprune.losses.__all__]
    shown += [f"tokenprune.errors.{name}" for name in errors.__all__ if name[0].isupper()]
    shown += [f"tokenprune.recipe.methods.{name}" for name in tokenprune.methods.__all__]
    assert [name for name in shown if f"::: {name}\n" not in page] == []


def test_the_first_page_is_short() -> None:
    """From nothing to a merged, timed and drawn model, and to a trained one."""
    python = [b for b in blocks_of(ROOT / "docs" / "index.md") if b.language == "python"]
    merged, trained = (len(list(filter(str.strip, b.code.splitlines()))) for b in python)
    assert (merged <= 10, trained <= 30) == (True, True)


def test_every_dependency_has_a_row() -> None:
    import versions

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = versions.page(ROOT)
    for words in ("| torch | tokenprune | 2.8 | 2.14.1 |", f"Version {project['version']}"):
        assert words in page
    assert "| peft | [clients], [examples] |" in page
    assert all(len(line.split("|")) == 6 for line in page.splitlines() if line.startswith("| "))
