"""Every code block of README and of the site runs, or says why it does not."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import typer
import yaml

from tests.docs.blocks import Block, blocks_of
from tests.docs.stand_ins import namespace, predictor_gradients, small_models
from tokenprune.cli.app import app
from tokenprune.recipe import Recipe

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs" / "_site"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))]
OTHERS = [
    (page, block) for page in PAGES for block in blocks_of(page) if block.language != "python"
]


@pytest.mark.filterwarnings(
    "error::tokenprune.errors.TokenPruneWarning",  # also the one that other tests ignore
    "ignore:'pin_memory' argument:UserWarning",
    "ignore::UserWarning:lightning",
    "ignore::FutureWarning:lightning",
)
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small_models(monkeypatch)
    gradients = predictor_gradients(monkeypatch)
    names = namespace()
    for block in blocks_of(page):
        if block.language != "python":
            continue
        # empty lines in front, so that a traceback names the line of the page
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.reason is None:
            torch.manual_seed(0)
            exec(code, names)
        if page.stem == "own-loop":
            assert any(gradients), f"the loop at line {block.line} trains no predictor"
            gradients.clear()


@pytest.mark.parametrize(
    ("page", "block"), OTHERS, ids=[f"{page.stem}:{block.line}" for page, block in OTHERS]
)
def test_other_languages(page: Path, block: Block) -> None:
    """Recipes are read, commands are parsed by the program that would run them."""
    if block.language == "yaml" and "version:" in block.code:
        Recipe.from_text(block.code)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "toml":
        tomllib.loads(block.code)
    elif block.language == "bash":
        for line in block.code.replace("\\\n", " ").splitlines():
            check_command(shlex.split(line, comments=True))
    else:
        assert block.language in ("", "text", "diff"), f"nothing checks {block.language}"


def check_command(words: list[str]) -> None:
    """Whether such a command exists and has these options."""
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    if "tokenprune" in words and words[0] in ("tokenprune", "torchrun"):
        program = typer.main.get_command(app)
        name, *rest = words[words.index("tokenprune") + 1 :]
        command = program.get_command(None, name)  # type: ignore[attr-defined, arg-type]
        assert command is not None, f"tokenprune has no command {name!r}"
        if name != "recipes":
            command.make_context(name, rest)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["accelerate", "launch"]:
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), words[2]
    else:
        assert words[0] in ("pip", "pytest", "trtexec", "python"), f"nothing checks {words[0]!r}"


def test_links_between_pages_and_to_files() -> None:
    """As on the forge, where no program checks them: pages, files and anchors exist."""
    made = {"changelog.md", "contributing.md", "messages.md", "versions.md"}
    made |= set(re.findall(r'"(api[\w-]*\.md)"', (SITE / "reference.py").read_text()))
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if "://" in target or (page.parent.name == "docs" and name in made):
                continue
            other = page.parent / name if name else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(f"{page.name}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as Markdown renderers make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()).strip() for head in heads)
    return {re.sub(r" +", "-", head) for head in plain}


def test_a_block_that_does_not_run_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n- b\n\n  <!-- not run: needs a card -->\n"
        "  ```python\n  if a:\n      b()\n  ```\n"
    )
    first, second = blocks_of(page)
    assert (first.code, first.line, first.reason) == ("a = 1\n", 4, None)
    assert (second.code, second.reason) == ("if a:\n    b()\n", "needs a card")
    assert ast.parse(second.code)
