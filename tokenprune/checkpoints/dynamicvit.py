"""The DynamicViT authors' checkpoints, turned into hosts and predictors of this library.

`release` reads their files and renames what is in them. This module finds which published model a
file holds, and writes it as a checkpoint of this library. DeiT and Swin become timm hosts, LV-ViT
the `lvvit_*` of `tokenprune.models`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.checkpoints.directory import save
from tokenprune.checkpoints.fit import check_fit
from tokenprune.checkpoints.release import Layout, Source, count_blocks, read_release, rename
from tokenprune.errors import CheckpointError, PlanError
from tokenprune.hosts.build import build_host
from tokenprune.recipe import Recipe, list_recipes, load_recipe
from tokenprune.recipe.counting import num_keep
from tokenprune.runtime.added import added_names
from tokenprune.runtime.model import pruning_of
from tokenprune.wrapping import wrap

__all__ = ["Converted", "convert_dynamicvit", "load_dynamicvit"]

# (layout, channels, blocks of each level) of the hosts that have a recipe.
HOSTS: dict[tuple[Layout, int, tuple[int, ...]], str] = {
    ("deit", 192, (12,)): "deit-tiny",
    ("deit", 256, (12,)): "deit-256",
    ("deit", 384, (12,)): "deit-small",
    ("deit", 768, (12,)): "deit-base",
    ("lvvit", 384, (16,)): "lvvit-s",
    ("lvvit", 512, (20,)): "lvvit-m",
    ("swin", 96, (2, 2, 6, 2)): "swin-tiny",
    ("swin", 96, (2, 2, 18, 2)): "swin-small",
    ("swin", 128, (2, 2, 18, 2)): "swin-base",
}
State = Mapping[str, Tensor]
BASE_RATIO = 0.7
SWIN_STEP = 0.2
SWIN_PATCHES = 196


@dataclass(frozen=True)
class Converted:
    """A release file in this library's names.

    Attributes:
        host: Which published model it is, such as `deit-small`.
        recipe: Where and how much it prunes, with the authors' own token counts, and how timm
            builds the host.
        weights: Everything that the wrapped host's state dict holds.
        path: The directory that was written; `tokenprune.load(path, host)` reads it. None if none.
    """

    host: str
    recipe: Recipe
    weights: Mapping[str, Tensor]
    path: Path | None = None

    def build_host(self) -> nn.Module:
        """The dense host, with random weights, in eval mode.

        Raises:
            PlanError: The recipe names no host.
        """
        if self.recipe.host is None:
            raise PlanError(f"Recipe {self.recipe.name!r} names no host. Give it a `host` section.")
        return build_host(self.recipe.host)

    def build(self, *, verify: bool = False) -> Any:
        """The wrapped host with the file's weights, in eval mode.

        Args:
            verify: As for `wrap`.
        """
        model = wrap(self.build_host(), self.recipe, verify=verify, train=False)
        model.load_state_dict(self.weights)
        return model.eval()


def convert_dynamicvit(
    source: Source,
    directory: str | os.PathLike[str] | None = None,
    *,
    keep_ratio: float | None = None,
) -> Converted:
    """Read a DynamicViT release file, and write it as a checkpoint of this library.

    The model is recognised by names and shapes. Nothing is written unless everything fits.

    Args:
        source: The authors' file.
        directory: Where to write, as `tokenprune.save` does; None writes nothing.
        keep_ratio: The base ratio rho of the model, which its weights do not tell. None for what
            the file's training arguments say, and 0.7 if it has none.

    Raises:
        CheckpointError: It cannot be read, holds code, or is no such model; what does not fit is
            listed.
        NonFiniteWeightsError: It holds NaN or inf.
        PlanError: A keep ratio that leaves a stage no tokens.

    Example:
        >>> done = tokenprune.convert_dynamicvit("dynamicvit_deit-s_r0.7.pth", "deit-s-0.7")
        >>> model = tokenprune.load(done.path, done.build_host())
    """
    if directory is not None and Path(directory).is_file():
        raise CheckpointError(
            f"Cannot write to {os.fspath(directory)!r}: it is a file. Name a directory."
        )
    file, rho = read_release(source)
    layout, weights = rename(file, source)
    host, options = _identify(layout, weights, source)
    recipe = _recipe(host, layout, weights, rho if keep_ratio is None else keep_ratio, options)
    done = Converted(host, recipe, weights)
    with torch.device("meta"):
        dense = done.build_host()
    model = wrap(dense, recipe, verify=False, train=False)
    head = _does_not_fit(source, f"{host} ({recipe.name})")
    check_fit(weights, model.state_dict(), source="file", head=head)
    if directory is None:
        return done
    model.to_empty(device="cpu").load_state_dict(weights)
    return replace(done, path=save(model, directory))


def load_dynamicvit(model: nn.Module, source: Source) -> None:
    """Load a DynamicViT release file into a wrapped model of the same architecture and any size.

    A file that holds predictors only leaves the host's weights as they are. Keep ratios stay too:
    the authors' Swin files go with 97 of 196 tokens at the second stage, where rho = 0.7 gives 98
    (their 0.7 - 0.2 is a little below 0.5); `convert_dynamicvit` sets that, and so does
    `model.set_keep_ratio([0.7, 0.495, 0.3])`.

    Args:
        model: What `wrap` returned.
        source: The authors' file.

    Raises:
        NotWrappedError: `model` is not wrapped.
        CheckpointError: As for `convert_dynamicvit`; the model is as it was.
        NonFiniteWeightsError: It holds NaN or inf.
    """
    pruning_of(model)
    file, _ = read_release(source)
    _, weights = rename(file, source)
    own = model.state_dict()
    if all(name.startswith(added_names()) for name in weights):
        given = {name.partition(".")[0] for name in weights}
        own = {name: tensor for name, tensor in own.items() if name.partition(".")[0] in given}
    head = _does_not_fit(source, f"this {type(model).__name__}")
    check_fit(weights, own, source="file", head=head)
    model.load_state_dict(weights, strict=False)


def _does_not_fit(source: Source, what: str) -> str:
    return f"{os.fspath(source)!r} does not fit {what}; names are ours, after the conversion:"


def _identify(layout: Layout, weights: State, source: Source) -> tuple[str, dict[str, Any]]:
    """Which published host it is, and the options for timm in addition to the recipe's."""
    first = weights.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(
            f"{os.fspath(source)!r} holds predictors but no host (no 'patch_embed.proj.weight'). "
            "Load it into a wrapped host with load_dynamicvit(model, file)."
        )
    width, depths = first.shape[0], count_blocks(weights)
    host = HOSTS.get((layout, width, depths))
    if host is None:
        known = "; ".join(
            f"{name}: {channels} channels, {_blocks(blocks)}"
            for (kind, channels, blocks), name in HOSTS.items()
            if kind == layout
        )
        raise CheckpointError(
            f"{os.fspath(source)!r} has the layout of {layout} with {width} channels and "
            f"{_blocks(depths)}; no published model has these sizes ({known}). Build and wrap the "
            "host yourself, then use load_dynamicvit(model, file)."
        )
    options: dict[str, Any] = {}
    head = weights.get("head.fc.weight" if layout == "swin" else "head.weight")
    if head is not None and head.shape[0] != 1000:
        options["num_classes"] = head.shape[0]
    patches = _num_patches(layout, weights)
    if patches != 196:
        patch = first.shape[-1] * (2 if layout == "lvvit" else 1)
        options["img_size"] = math.isqrt(patches) * patch
    return host, options


def _blocks(depths: Sequence[int]) -> str:
    return f"{'+'.join(map(str, depths))} blocks"


def _num_patches(layout: Layout, weights: State) -> int:
    if layout == "swin" or "pos_embed" not in weights:
        return SWIN_PATCHES
    return weights["pos_embed"].shape[1] - 1


def _recipe(
    host: str, layout: Layout, weights: State, rho: float | None, options: Mapping[str, Any]
) -> Recipe:
    """The shipped recipe of a host at ratio rho, with the counts of the authors' code."""
    rho = BASE_RATIO if rho is None else rho
    name = f"dynamicvit-{host}-k{rho:g}"
    recipe = load_recipe(name if name in list_recipes() else f"dynamicvit-{host}-k{BASE_RATIO:g}")
    blocks = [stage.block for stage in recipe.resolved_stages]
    # Their expressions: the rounding error of a float decides what int() makes of it.
    swin, stages = layout == "swin", range(len(blocks))
    exact = [rho - SWIN_STEP * s if swin else rho ** (s + 1) for s in stages]
    if not all(0.0 < ratio <= 1.0 for ratio in exact):
        raise PlanError(
            f"keep_ratio {rho} gives stages of {exact}; every one must lie in (0, 1]. Give a ratio "
            "in (0, 1], for Swin one above 0.4."
        )
    patches = _num_patches(layout, weights)
    ratios = [_ratio_for(int(patches * ratio), patches, ratio) for ratio in exact]
    if name != recipe.name or ratios != [s.keep_ratio for s in recipe.resolved_stages]:
        recipe = recipe.with_stages(blocks, ratios)
    mapping = recipe.model_dump(mode="json", exclude_none=True)
    mapping["name"] = name
    mapping["host"]["kwargs"] |= options
    return Recipe.parse(mapping)


def _ratio_for(count: int, patches: int, ratio: float) -> float:
    """A short ratio near `ratio` that `num_keep` turns into `count`."""
    short = float(f"{ratio:.12g}")
    if num_keep(patches, short) == max(count, 1):
        return short
    longer = math.ceil(count / patches * 1e3) / 1e3
    return longer if num_keep(patches, longer) == count else count / patches
