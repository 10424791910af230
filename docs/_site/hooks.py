"""Pages of the site that are made from the code when it is built, so that they are never old.

MkDocs calls the functions that begin with `on_`. Nothing here imports tokenprune: sources are read,
so that a site needs no torch.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import messages
import reference
import versions
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, *, config: Any) -> Files:
    """Add the generated pages."""
    pages: dict[str, Callable[[], str]] = {
        "changelog.md": lambda: _from_the_root("CHANGELOG.md"),
        "contributing.md": lambda: _from_the_root("CONTRIBUTING.md"),
        "messages.md": lambda: messages.page(ROOT),
        "versions.md": lambda: versions.page(ROOT),
        **{name: (lambda made=made: made(ROOT)) for name, made in reference.PAGES.items()},
    }
    for name, make in pages.items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Give the first page the width of the navigation, of which it has none; let a search find
    errors first."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]
    if page.file.src_uri in ("errors.md", "messages.md"):
        page.meta["search"] = {"boost": 4}
    return markdown


def _from_the_root(name: str) -> str:
    """A page of the folder above `docs/`, with links that hold inside of `docs/`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)
