"""`README.md` of a saved model: what it costs, what it keeps, how it is loaded.

On the Hugging Face Hub this is the model card.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.checkpoints.facts import ADDED, CARD, CERTIFICATE, RECIPE, WEIGHTS, Facts
from tokenprune.checkpoints.hub import hub_client
from tokenprune.checks.certificate import Certificate
from tokenprune.cost.profile import Profile, profile
from tokenprune.errors import MissingDependencyError
from tokenprune.report.plots import draw_blocks
from tokenprune.report.visualize import pruning_grid
from tokenprune.runtime.model import pruning_of
from tokenprune.runtime.pruning import Pruning
from tokenprune.tracing.state import in_mode

__all__ = ["CARD_PICTURES", "is_generated", "write_card"]

CARD_PICTURES = BLOCKS, IMAGES = "card-blocks.png", "card-images.png"
SHOWN = 4  # images
MARK = "<!-- tokenprune wrote this file and replaces it; remove this line to keep your changes. -->"


def is_generated(card: Path) -> bool:
    """Whether a model card is as it was written here: there, with its mark."""
    return card.is_file() and MARK.encode() in card.read_bytes()


def write_card(
    model: nn.Module,
    folder: Path,
    facts: Facts,
    *,
    name: str,
    local: bool,
    certificate: Certificate | None,
    images: Tensor | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write `README.md`, and its pictures.

    Args:
        model: What `wrap` returned.
        folder: Where to.
        facts: Of the folder.
        name: Of the folder or repository, as `tokenprune.load` takes it.
        local: It is a folder.
        certificate: What `verify` found.
        images: [B, C, height, width] as the model takes them; the first few are drawn.
        metadata: Of the Hub: `license`, `datasets`, `base_model`, ...

    Raises:
        MissingDependencyError: huggingface_hub, or for images Pillow, is not installed.
    """
    hub = hub_client("A model card (card=False leaves it out)")
    pruning, counted = pruning_of(model), profile(model)
    reduction = pruning.method.reduction
    known = {
        "library_name": "tokenprune",
        "tags": [reduction.tag, facts.host["library"] or "pytorch"],
    }
    classifies = type(model).__name__.endswith("ForImageClassification")
    if classifies or getattr(model, "num_classes", 0):  # type: ignore[arg-type]
        known["pipeline_tag"] = "image-classification"
    header = hub.ModelCardData(**{**known, **(metadata or {})}).to_yaml()
    pictures = _pictures(model, folder, counted, images)
    parts = [
        f"# {Path(name).name}",
        _what(pruning, counted),
        _figures(pruning, counted),
        *pictures,
        _usage(facts, name, local, type(pruning.host).__name__),
        _proof(certificate),
        _files(folder, facts),
        MARK,
    ]
    text = f"---\n{header}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    (folder / CARD).write_text(str(hub.ModelCard(text)), encoding="utf-8")


def _what(pruning: Pruning, counted: Profile) -> str:
    recipe = pruning.recipe.name or "a recipe of its own"
    what = pruning.method.reduction.in_words
    return (
        f"`{type(pruning.host).__name__}` in which {what} on the way through its blocks, by "
        f"tokenprune ({recipe}). It needs "
        f"**{100 * counted.ratio:.1f} %** of the multiply-accumulates (MACs) of the dense model."
    )


def _figures(pruning: Pruning, counted: Profile) -> str:
    rows = [
        "| | this model | dense |",
        "|---|---:|---:|",
        f"| GMACs of one image | {counted.gmacs:.4g} | {counted.dense_gmacs:.4g} |",
    ]
    kept = pruning.budget.counts(counted.patches_per_stage)
    for block, count, patches in zip(counted.stages, kept, counted.patches_per_stage, strict=True):
        rows.append(f"| patch tokens from block {block} on | {count} | {patches} |")
    threshold = pruning.budget.threshold
    if threshold is not None:
        rows.append(
            f"\nTokens with a keep probability above {threshold:g} stay, so images cost different "
            "amounts; the table counts one that keeps as many as training aimed at."
        )
    return "\n".join(rows)


def _pictures(model: nn.Module, folder: Path, counted: Profile, images: Tensor | None) -> list[str]:
    drawn = []
    if images is not None:
        shown = images[:SHOWN]
        place = next(model.parameters())
        with in_mode(model, training=False), torch.no_grad():
            _, trace = model(shown.to(place.device, place.dtype), return_trace=True)
        shown = shown.detach().float().cpu()
        low, high = (f(shown.flatten(1), 1).view(-1, 1, 1, 1) for f in (torch.amin, torch.amax))
        picture = pruning_grid((shown - low) / (high - low).clamp_min(1e-12), trace)
        picture.save(folder / IMAGES, format="PNG")
        drawn.append(f"![The patches that are left after each stage]({IMAGES})")
    predictors = dict(zip(counted.stages, counted.predictor_macs, strict=True))
    own = [macs + predictors.get(block, 0) for block, macs in enumerate(counted.macs_per_block)]
    with suppress(MissingDependencyError):  # without matplotlib the table has the figures
        dense = [macs / 1e9 for macs in counted.dense_macs_per_block]
        draw_blocks(folder / BLOCKS, dense, [macs / 1e9 for macs in own])
        drawn.append(f"![GMACs of each block, dense and in this model]({BLOCKS})")
    return drawn


def _usage(facts: Facts, name: str, local: bool, host: str) -> str:
    library = facts.host["library"]
    given = f'"{name}"' if library else f'"{name}", host'
    lines = [
        "## Use",
        f"```bash\npip install 'tokenprune-torch[hub]'{f' {library}' if library else ''}\n```",
        f"```python\nimport tokenprune\n\nmodel = tokenprune.load({given})\n```",
    ]
    if not library:
        lines.append(f"`host` is a `{facts.host['class']}`, built as the saved one was.")
    dense = {
        "timm": f'import timm\n\nhost = timm.create_model("{"local-dir" if local else "hf-hub"}:'
        f'{name}", pretrained=True)',
        "transformers": f"import transformers\n\nhost = transformers.{host}.from_pretrained("
        f'"{name}")',
    }
    if library:
        lines += [
            f"**Without tokenprune** {library} loads `{WEIGHTS}` as the dense model: every token "
            "stays, at the cost of the right column.",
            f"```python\n{dense[library]}\n```",
        ]
    return "\n\n".join(lines)


def _proof(certificate: Certificate | None) -> str:
    if certificate is None:
        return ""
    return (
        "## Certificate\n\nWhat `tokenprune.verify` measured on this model with these weights: the "
        f"paths of training and inference agree.\n\n```\n{certificate}\n```"
    )


def _files(folder: Path, facts: Facts) -> str:
    what = {
        WEIGHTS: "weights of the dense host",
        ADDED: "the predictors, and what else tokenprune added",
        RECIPE: "where tokens leave, and how many",
        CERTIFICATE: "the certificate as data",
    }
    rows = [f"| `{file}` | {text} |" for file, text in what.items() if (folder / file).exists()]
    made = ", ".join(f"{library} {number}" for library, number in facts.versions.items())
    return "\n".join(
        ["## Files", "", "| file | holds |", "|---|---|", *rows, "", f"Made with {made}."]
    )
