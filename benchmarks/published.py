"""DynamicViT's published models: MACs by `profile` against the authors' figures.

    python -m benchmarks.published           writes docs/published.md
    python -m benchmarks.published --check   fails if it would change

Takes about a minute. Nothing is computed: models are traced and counted on fake tensors.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import tokenprune
import tokenprune.models
from tokenprune.cost.profile import profile
from tokenprune.recipe import Recipe, load_recipe
from tokenprune.recipe.counting import num_keep

__all__ = ["DOCUMENT", "PUBLISHED", "TITLES", "Published", "Row", "count", "line", "main", "render"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "published.md"
README, COPY = "", " †"


@dataclass(frozen=True)
class Published:
    """One model of the authors.

    Attributes:
        host: As in recipe names.
        rho: Base keep ratio.
        code: GMACs of the authors' code, counted by running it in eval.
        gmacs: GMACs that they publish, with one digit; None where they publish none.
        top1: Accuracy that they publish, in percent; None where they publish none.
        source: `README` of the authors, or a `COPY` of their table.
    """

    host: str
    rho: float
    code: float
    gmacs: float | None = None
    top1: float | None = None
    source: str = README


@dataclass(frozen=True)
class Row:
    """Our counts.

    Attributes:
        published: The authors' figures.
        kept: Patch tokens after each stage, at 224 pixels.
        gmacs: GMACs of the pruned model, predictors included.
        plain_gmacs: The same if the first output layer of the predictors processed the shared half
            of the channels once per token, as the authors' does, and not once per image.
        dense_gmacs: GMACs of the host.
        predictor_share: Share of the predictors in `gmacs`.
    """

    published: Published
    kept: tuple[int, ...]
    gmacs: float
    plain_gmacs: float
    dense_gmacs: float
    predictor_share: float

    @property
    def speed_bound(self) -> float:
        """The speed-up if time were proportional to MACs."""
        return self.dense_gmacs / self.gmacs


# Title, published top-1 and GMACs of the dense host.
TITLES = {
    "deit-256": ("DeiT-256", None, None),
    "deit-small": ("DeiT-S", 79.8, 4.6),
    "deit-base": ("DeiT-B", 81.8, 17.6),
    "lvvit-s": ("LV-ViT-S", 83.3, 6.6),
    "lvvit-m": ("LV-ViT-M", 84.0, 12.7),
    "swin-tiny": ("Swin-T", 81.2, 4.5),
    "swin-small": ("Swin-S", 83.2, 8.7),
    "swin-base": ("Swin-B", 83.5, 15.4),
}

PUBLISHED = (
    Published("deit-256", 0.9, 1.8682),
    Published("deit-256", 0.8, 1.5979),
    Published("deit-256", 0.7, 1.3746, 1.3, 76.53),
    Published("deit-256", 0.5, 1.0301),
    Published("deit-small", 0.9, 4.0407, 4.0, 79.8, COPY),
    Published("deit-small", 0.8, 3.4631, 3.4, 79.8, COPY),
    Published("deit-small", 0.7, 2.9809, 2.9, 79.32),
    Published("deit-small", 0.5, 2.2291),
    Published("deit-base", 0.9, 15.5124),
    Published("deit-base", 0.8, 13.3231),
    Published("deit-base", 0.7, 11.4758, 11.4, 81.43),
    Published("deit-base", 0.5, 8.5613),
    Published("lvvit-s", 0.9, 5.8763),
    Published("lvvit-s", 0.8, 5.2062),
    Published("lvvit-s", 0.7, 4.6501, 4.6, 83.08),
    Published("lvvit-s", 0.5, 3.7902, 3.7, 81.97),
    Published("lvvit-m", 0.9, 11.2067),
    Published("lvvit-m", 0.8, 9.7826, None, 83.9, COPY),
    Published("lvvit-m", 0.7, 8.5932, 8.5, 83.82),
    Published("lvvit-m", 0.5, 6.7406),
    Published("swin-tiny", 0.9, 4.2466),
    Published("swin-tiny", 0.7, 4.0412, 4.0, 80.91),
    Published("swin-small", 0.9, 7.5049),
    Published("swin-small", 0.7, 6.8464, 6.9, 83.21),
    Published("swin-base", 0.9, 13.2337),
    Published("swin-base", 0.7, 12.0629, 12.1, 83.43),
)


def count(host: str) -> list[Row]:
    """Count all models of one host; it is built and traced once."""
    wanted = [row for row in PUBLISHED if row.host == host]
    recipes = [load_recipe(f"dynamicvit-{host}-k{row.rho:g}") for row in wanted]
    model = tokenprune.wrap(_build(recipes[0]), recipes[0], verify=False, train=False)
    rows = []
    for published, recipe in zip(wanted, recipes, strict=True):
        stages = recipe.resolved_stages
        if [s.block for s in stages] != [s.block for s in recipes[0].resolved_stages]:
            raise SystemExit(f"{recipe.name} has other stages than {recipes[0].name}.")
        model.set_keep_ratio([stage.keep_ratio for stage in stages])
        found = profile(model)
        kept = tuple(num_keep(196, stage.keep_ratio, recipe.sampling.rounding) for stage in stages)
        plain = (found.macs + _saved(model.token_predictors, found.predictor_macs)) / 1e9
        rows.append(
            Row(published, kept, found.gmacs, plain, found.dense_gmacs, found.predictor_share)
        )
    return rows


def _saved(predictors: Any, macs: Sequence[int]) -> int:
    """MACs that predictors save by processing the channels that tokens share once per image."""
    saved = 0
    for predictor, counted in zip(predictors, macs, strict=True):
        dim = predictor.dim
        local, hidden, narrow = dim // 2, dim // 2, dim // 4
        of_image = (dim - local) * hidden
        of_token = dim * dim + local * hidden + hidden * narrow + narrow * 2
        tokens, rest = divmod(counted - of_image, of_token)
        if rest:
            raise SystemExit(f"A predictor of {dim} channels has {counted} MACs: no whole tokens.")
        saved += (tokens - 1) * of_image
    return saved


def _build(recipe: Recipe) -> nn.Module:
    """The host, all zeros: drawing weights would take most of the time."""
    if recipe.host is None:
        raise SystemExit(f"{recipe.name} names no host.")
    with torch.device("meta"):
        host: nn.Module = timm.create_model(recipe.host.model, **recipe.host.kwargs)
    host = host.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in (*host.parameters(), *host.buffers()):
            tensor.zero_()
    return host


def line(row: Row) -> str:
    """A row of the table."""
    published = row.published
    title, _, _ = TITLES[published.host]
    top1 = "" if published.top1 is None else f"{published.top1:g}{published.source}"
    gmacs = "" if published.gmacs is None else f"{published.gmacs:.1f}{published.source}"
    difference = round(100 * (row.plain_gmacs / published.code - 1), 2) + 0.0  # no minus zero
    cells = [
        title,
        f"{published.rho:g}",
        " ".join(map(str, row.kept)),
        f"**{row.gmacs:.3f}**",
        f"{row.plain_gmacs:.3f}",
        f"{published.code:.3f}",
        f"{difference:.2f} %",
        gmacs,
        f"{row.dense_gmacs:.3f}",
        f"{100 * (1 - row.gmacs / row.dense_gmacs):.1f} %",
        f"{100 * row.predictor_share:.1f} %",
        f"{row.speed_bound:.2f}x",
        top1,
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
# DynamicViT's published models, counted

    python -m benchmarks.published

wrote this page, from the shipped recipes `dynamicvit-<host>-k<rho>` and `tokenprune.profile`. One
image of 224 x 224 pixels, eval, multiply-accumulates (what the papers call FLOPs), attention and
predictors included. `tests/product/test_published.py` counts every row again.

| column | what it is |
|--------|------------|
| kept | patch tokens, of 196, after each stage; for Swin, those that go through the MLP |
| **GMACs** | counted here, by `profile` |
| as theirs | the same with predictors that process the mean over the tokens once per token, \
as the authors' do; ours process it once per image |
| authors' code | GMACs counted by running the authors' public code (1322e626) in eval; \
`difference`: `as theirs` relative to it |
| published | GMACs in the authors' table: one digit, truncated or rounded |
| dense | GMACs of the host without pruning, counted here |
| predictors | their share in the pruned model's MACs |
| bound | the speed-up if time were proportional to MACs |
| top-1 | **the authors' own accuracy** on ImageNet-1k, in percent. Not measured here |

"""

FOOT = """
† from a Papers with Code entry that copies the authors' figures; all others are from their README.
Dense hosts, the authors' figures: {dense}.

Swin at 0.7: the shipped recipes keep 98 tokens at the second stage, where the authors' code keeps
97, because its 0.7 - 0.2 is slightly below 0.5. `tokenprune convert` keeps 97, as the code does.
"""


def render(rows: list[Row]) -> str:
    """The whole page."""
    names = [
        "model",
        "rho",
        "kept",
        "GMACs",
        "as theirs",
        "authors' code",
        "difference",
        "published",
        "dense",
        "saved",
        "predictors",
        "bound",
        "top-1",
    ]
    dense = ", ".join(
        f"{title} {top1} % at {gmacs}" for title, top1, gmacs in TITLES.values() if top1
    )
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *map(line, rows)]
    return HEAD + "\n".join(table) + "\n" + FOOT.format(dense=dense)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    rows = []
    for host in TITLES:
        print(f"counting {host}", file=sys.stderr, flush=True)
        rows += count(host)
    text = render(rows)
    worst = max(rows, key=lambda row: abs(row.plain_gmacs / row.published.code - 1))
    print(f"largest difference from the authors' code: {line(worst)}")
    if not options.check:
        DOCUMENT.write_text(text, encoding="utf-8")
    elif DOCUMENT.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{DOCUMENT.name} is not what the models count today; run without --check")


if __name__ == "__main__":
    main()
