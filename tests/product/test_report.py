"""Pictures, tables and HTML."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tokenprune.errors import HostError, MissingDependencyError
from tokenprune.report.html import Bars, Picture, Text, write_html
from tokenprune.report.table import Table
from tokenprune.report.visualize import DROPPED, LEFT, grid_shape, kept_pixels, pruning_grid
from tokenprune.rewrite.kept.pruning_trace import PruningTrace, StageTrace


def trace_of(*decisions: torch.Tensor) -> PruningTrace:
    stages = [StageTrace(torch.zeros(*d.shape, 2), d, None, d.sum(1).mean()) for d in decisions]
    return PruningTrace(stages, torch.zeros(len(decisions[0]), 4, 8))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(4, 32), st.integers(0, 3))
def test_the_grid_of_square_patches_is_found(
    rows: int, columns: int, patch: int, margin: int
) -> None:
    height, width = rows * patch + margin % patch, columns * patch + margin % patch
    assert grid_shape(rows * columns, height, width) == (rows, columns)


@pytest.mark.parametrize(("patches", "height", "width"), [(12, 32, 32), (17, 32, 32), (4, 10, 90)])
def test_tokens_that_form_no_grid(patches: int, height: int, width: int) -> None:
    with pytest.raises(HostError, match=f"{patches} patch tokens form no grid"):
        grid_shape(patches, height, width)


def test_kept_pixels_are_those_of_kept_patches() -> None:
    decision = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    kept = kept_pixels(decision, (2, 2), (4, 4))
    corner = torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(kept[0], torch.block_diag(corner.int(), corner.int()).bool())


def pixel(picture: Any, column: int, row: int, tile: int = 40, line: int = 0) -> tuple[int, ...]:
    """The colour in the middle of the top left patch (of 2 x 2) of one tile."""
    x = 6 + column * (tile + 6) + tile // 4
    y = 34 + 6 + row * (tile + 6 + line) + tile // 4
    found: tuple[int, ...] = picture.getpixel((x, y))
    return found


def test_the_picture_dims_what_each_stage_dropped() -> None:
    first = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1]])
    second = torch.tensor([[0.0, 1, 0, 1], [0, 1, 1, 0]])
    images = torch.ones(2, 1, 8, 8)
    picture = pruning_grid(images, trace_of(first, second), tile=40)
    assert picture.size == (6 + 3 * 46, 34 + 6 + 2 * 46)
    white = (255, 255, 255)
    dimmed = tuple(round(255 * (LEFT + (1 - LEFT) * part)) for part in DROPPED)
    seen = [[pixel(picture, column, row) for column in range(3)] for row in range(2)]
    assert seen == [[white, white, dimmed], [white, dimmed, dimmed]]


def test_the_picture_of_large_and_wide_images_with_labels() -> None:
    decision = torch.tensor([[0.0, 1, 1, 1, 1, 1, 1, 1]])
    images = torch.zeros(1, 3, 100, 200)
    picture = pruning_grid(images, trace_of(decision), labels=["a cat"], tile=80)
    assert picture.size == (6 + 2 * 86, 34 + 6 + 40 + 6 + 14)
    under = picture.crop((6, 34 + 6 + 40, 86, picture.height))
    assert min(low for low, _ in under.getextrema()) < 100  # the label is there


def test_images_and_trace_must_fit() -> None:
    trace = trace_of(torch.ones(2, 4))
    with pytest.raises(HostError, match=r"Got 3 images, a trace of 2"):
        pruning_grid(torch.zeros(3, 3, 8, 8), trace)
    with pytest.raises(HostError, match=r"found \[3, 8, 8\]"):
        pruning_grid(torch.zeros(3, 8, 8), trace)
    with pytest.raises(HostError, match="1 labels"):
        pruning_grid(torch.zeros(2, 3, 8, 8), trace, labels=["one"])
    with pytest.raises(HostError, match="no stage"):
        pruning_grid(torch.zeros(2, 3, 8, 8), PruningTrace([], torch.zeros(2, 4, 8)))


def test_pictures_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokenprune-torch\[cli\]'"):
        pruning_grid(torch.zeros(2, 3, 8, 8), trace_of(torch.ones(2, 4)))


class Reader(HTMLParser):
    """Collects tags, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_whole_and_holds_everything(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    blocks = [
        Text("5 < 6 & more"),
        Table("A <table>", ("what", "value"), (("accuracy", "98 %"),), "a note"),
        Bars("Bars", (("blocks.0", 1.0, 2.0, "half"),)),
        Picture("Picture", png, "what it shows"),
    ]
    path = write_html(tmp_path / "deep" / "report.html", "A title", blocks)
    text = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert len(reader.links) == 1
    assert not re.search(r"https?:|@import|<script|url\(", text)
    for shown in ("5 < 6 & more", "A <table>", "accuracy", "98 %", "a note", "half", "A title"):
        assert shown in reader.text
    assert "width:50.0%" in text


def test_bars_of_nothing(tmp_path: Path) -> None:
    path = write_html(tmp_path / "r.html", "t", [Bars("Empty", (("a", 0.0, 0.0, ""),))])
    assert "width:0.0%" in path.read_text()


def test_a_table_is_rectangular() -> None:
    with pytest.raises(ValueError, match=r"table 'T' has 1 cells, its columns are 2"):
        Table("T", ("a", "b"), (("1", "2"), ("3",)))
