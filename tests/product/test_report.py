"""Pictures, tables and HTML."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import tokenprune
from tokenprune.checkpoints.directory import saved_recipe
from tokenprune.cli.app import app
from tokenprune.errors import HostError, MissingDependencyError, RecipeError
from tokenprune.report.html import Bars, Picture, Text, write_html
from tokenprune.report.table import Table
from tokenprune.report.visualize import (
    BORDER,
    DROPPED,
    LEFT,
    grid_shape,
    kept_pixels,
    paint_groups,
    pruning_grid,
)
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


# Patches of 4 x 4 pixels, 2 rows of 3: patches 0 and 4 are a group of two pieces, 1 and 2 another.
GROUPS = torch.tensor([[4, 1, 1, 3, 4, 5]])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_group_has_the_mean_colour_of_its_pixels(channels: int) -> None:
    images = torch.rand(1, channels, 8, 12)
    painted = paint_groups(images, GROUPS)
    assert painted.shape == (1, 3, 8, 12)
    cells = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).flatten(2, 3)[0]  # [C, N, 16]
    for patch in range(6):
        members = [other for other in range(6) if GROUPS[0, other] == GROUPS[0, patch]]
        mean = cells[:, members].flatten(1).mean(1).expand(3)
        top, left = 4 * (patch // 3), 4 * (patch % 3)
        inside = painted[0, :, top : top + 3, left : left + 3]
        assert torch.allclose(inside, mean.view(3, 1, 1).expand_as(inside), atol=1e-6)


def test_borders_are_between_groups_and_nowhere_else() -> None:
    images = torch.full((1, 3, 8, 12), 0.8)
    edge = (paint_groups(images, GROUPS)[0, 0] - 0.8).abs() > 1e-6
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[:, 3] = True  # right of patches 0 and 3
    expected[4:, 7] = True  # between 4 and 5; none between 1 and 2, which are one group
    expected[3] = True  # below all three of the first row
    assert torch.equal(edge, expected)
    assert not (paint_groups(images, torch.zeros(1, 6, dtype=torch.long)) != 0.8).any()
    dark = paint_groups(images * 0, GROUPS)  # borders of dark groups are bright
    assert torch.allclose(dark[0, :, 0, 3], torch.tensor(BORDER))
    assert torch.allclose(
        paint_groups(images, GROUPS)[0, :, 0, 3], torch.tensor(0.8 - 0.8 * BORDER)
    )


def test_each_image_has_its_own_groups_at_any_size() -> None:
    images = torch.rand(2, 3, 9, 13)  # one pixel more than the patches cover
    groups = torch.cat([GROUPS, torch.arange(6).unsqueeze(0)])
    both = paint_groups(images, groups, (40, 60))
    assert both.shape == (2, 3, 40, 60)
    for image in range(2):
        alone = paint_groups(images[image : image + 1], groups[image : image + 1], (40, 60))
        assert torch.equal(both[image], alone[0])
    with pytest.raises(HostError, match="5 patch tokens form no grid"):
        paint_groups(images, groups[:, :5])


def merged_trace(*groups: torch.Tensor) -> PruningTrace:
    decisions = [(g == torch.arange(g.shape[1])).float() for g in groups]
    trace = trace_of(*decisions)
    for stage, group in zip(trace.stages, groups, strict=True):
        stage.groups = group
    return trace


def test_merged_patches_have_a_row_of_their_own() -> None:
    images = torch.zeros(2, 1, 8, 12)
    images[:, :, :, 6:] = 1.0
    groups = torch.cat([GROUPS, GROUPS])
    trace = merged_trace(torch.arange(6).expand(2, -1), groups)
    picture = pruning_grid(images, trace, labels=["a", "b"], tile=120)
    assert picture.size == (6 + 3 * 126, 34 + 6 + 2 * (2 * 86 + 14))
    top = 34 + 6
    dimmed = tuple(round(255 * (1 - LEFT) * part) for part in DROPPED)
    white, black, half = (255, 255, 255), (0, 0, 0), (128, 128, 128)
    for image in range(2):
        mask, painted = top + image * 186 + 10, top + image * 186 + 86 + 10
        assert picture.getpixel((6 + 126 + 10, mask)) == black  # nothing is merged in stage 0
        assert picture.getpixel((6 + 2 * 126 + 10, mask)) == dimmed  # patch 0 joined patch 4
        assert picture.getpixel((6 + 2 * 126 + 50, painted)) in (half, (191, 191, 191))
        assert picture.getpixel((6 + 126 + 110, painted)) == white
    legend = picture.crop((6, top + 86, 126, top + 166))
    assert min(low for low, _ in legend.getextrema()) < 100  # says what the rows are
    small = pruning_grid(images, trace, tile=24)  # no room for a legend
    assert small.crop((6, 34 + 6 + 22, 30, 34 + 6 + 38)).getextrema() == ((255, 255),) * 3


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
VIT["num_classes"] = 3
BERT = "transformers:BertForSequenceClassification"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merging model of a host that no recipe describes; its folder says how it was built."""
    torch.manual_seed(0)
    host = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    model = tokenprune.wrap(host, "merge-k0.7", verify=False, train=False)
    described = {"library": "timm", "model": "vit_tiny_patch16_224", "kwargs": VIT}
    return tokenprune.save(model, tmp_path_factory.mktemp("saved"), host=described)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "cat.png", tmp_path / "dog.jpg"]
    for number, file in enumerate(files):
        Image.linear_gradient("L").resize((50 + number, 40)).save(file)
    return files


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


def test_the_command_line_writes_a_png_and_a_page(
    saved: Path, photos: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "out.png"
    result = run("visualize", saved, *photos, "-o", target, "--tile", "64")
    assert result.exit_code == 0, result.output
    assert f"picture   {target}" in result.stdout
    with Image.open(target) as picture:
        assert picture.size == (6 + 4 * 70, 34 + 6 + 2 * (2 * 70 + 14))
    page = tmp_path / "out.html"
    assert run("visualize", saved, *photos, "--output", page).exit_code == 0
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    assert len(reader.links) == 1
    for shown in ("merge-k0.7", "mean colour", "largest group", "blocks.2", "Of 2 image(s)."):
        assert shown in reader.text


def test_the_command_line_draws_models_by_name(photos: list[Path], tmp_path: Path) -> None:
    options = [part for name, value in VIT.items() for part in ("--option", f"{name}={value}")]
    grey = [*options, "--option", "in_chans=1", "--option", "img_size=[32, 64]"]
    page = tmp_path / "x.html"
    result = run("visualize", "vit_tiny_patch16_224", photos[0], *grey, "-o", page)
    assert result.exit_code == 0, result.output
    assert "dropped, by the recipe" in page.read_text(encoding="utf-8")


def test_a_folder_that_does_not_describe_its_host(
    saved: Path, photos: list[Path], tmp_path: Path
) -> None:
    recipe = saved_recipe(saved).model_copy(update={"host": None})
    by_hand = timm.models.vision_transformer.VisionTransformer(**VIT).eval()
    bare = tokenprune.wrap(by_hand, recipe, verify=False, train=False)
    folder = tokenprune.save(bare, tmp_path / "bare")
    named = ("--host", "vit_tiny_patch16_224")
    options = [part for name, value in VIT.items() for part in ("--option", f"{name}={value}")]
    for command in (["visualize", folder, photos[0]], ["inspect", folder, "--no-proof"]):
        result = run(*command)
        assert result.exit_code == 2
        assert "names no host to build. Give it with --host" in result.stderr
        assert run(*command, *named, *options).exit_code == 0
    with pytest.raises(RecipeError, match="model: this key is missing"):
        tokenprune.save(bare, tmp_path / "x", host={"library": "timm"})
    half = tokenprune.save(bare, folder, host={"library": "timm", "model": "vit_tiny_patch16_224"})
    result = run("visualize", half, photos[0])
    assert result.exit_code == 2
    assert "more arguments than its recipe says" in result.stderr
    assert "--option KEY=VALUE" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{saved}", "{photo}", "-o", "x.gif"], "ending is '.gif'. Pictures are written as .png"),
        (["{saved}", "{photo}", "--data", "x"], "Give image files or --data, not both"),
        (["{saved}", "{photo}", "--recipe", "merge-k0.7"], "--recipe is for building a model"),
        (["{saved}", "nothing.png"], "The image 'nothing.png' does not exist"),
        (["{saved}", "{photo}", "--option", "depth=2"], "name it with --host"),
        (["{saved}"], "does not say on which images it was trained"),
        (["vit_tiny_patch16_224"], "without images. Name image files"),
        (["vit_tiny_patch16_224", "{photo}", "--host", "x"], "--host is for a folder"),
        ([BERT, "{photo}", "-r", "token-norm-k0.7"], "takes no images: its"),
    ],
)
def test_what_visualize_refuses(
    arguments: list[str], message: str, saved: Path, photos: list[Path]
) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    rest = [part for name, value in small.items() for part in ("--option", f"{name}={value}")]
    rest = rest if arguments[0] == BERT else []
    given = [text.format(saved=saved, photo=photos[0]) for text in arguments]
    result = run("visualize", *given, *rest)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in result.stderr


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
