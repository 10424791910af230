"""Read the checkpoints of DynamicViT's authors, and give their tensors the names of a wrapped host.

Their files (github.com/raoyongming/DynamicViT) come in three layouts, `deit`, `lvvit` and `swin`.
Host weights have the names of the dense model they were fine-tuned from. There are also

- `score_predictor.{s}.`, in Swin `layers.{level}.score_predictor.{s}.`, whose `in_conv` and
  `out_conv` are our `in_proj` and `out_proj`;
- in Swin, the light branches `layers.{level}.blocks.{i}.fastmlp.fc1.`.

Swin's own release has a patch merging at the end of a level where timm has it at the start of the
next. Files are read with `weights_only`: a pickle with code in it is refused.
"""

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.checkpoints.fit import some
from tokenprune.errors import CheckpointError, NonFiniteWeightsError
from tokenprune.reductions.bypass import BYPASSES
from tokenprune.scorers.protocol import PREDICTORS

__all__ = ["Layout", "Source", "count_blocks", "read_release", "rename"]

Layout = Literal["deit", "lvvit", "swin"]
Source = str | os.PathLike[str]

PREDICTOR = re.compile(r"(?:layers\.(\d+)\.)?score_predictor\.(\d+)\.(in|out)_conv\.(.+)")
LIGHT_BRANCH = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.fastmlp\.fc1\.(.+)")
MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
BLOCK = re.compile(r"(?:layers\.(\d+)\.)?blocks\.(\d+)\.")
RECOMPUTED = ("relative_position_index", "attn_mask")
CODE = re.compile(r"GLOBAL ([\w.]+)")


def read_release(source: Source) -> tuple[dict[str, Tensor], float | None]:
    """The state dict in a file, and the base ratio if the file holds training arguments."""
    name = os.fspath(source)
    if not Path(source).is_file():
        raise CheckpointError(f"There is no file {name!r}. Check its path.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the reader makes of a pickle it then refuses
            content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = CODE.search(str(error))
        found = f"asks for {code[1]!r}" if code else "holds instructions that no checkpoint needs"
        raise CheckpointError(
            f"{name!r} is refused by torch.load(..., weights_only=True): it {found}, and reading "
            "it could run code. Only tensors, numbers, text and argparse.Namespace are read. Ask "
            "for a file that holds the state dict alone, or fetch it again if it may be damaged."
        ) from error
    except Exception as error:  # a damaged file can break the reader anywhere
        raise CheckpointError(
            f"{name!r} cannot be read as a PyTorch checkpoint ({type(error).__name__}: "
            f"{str(error)[:120]}). It is cut off, damaged or of another format; fetch it again."
        ) from error
    rho = getattr(content.get("args"), "base_rate", None) if isinstance(content, dict) else None
    state = content
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in pairs):
        raise CheckpointError(
            f"{name!r} holds no state dict, neither by itself nor under 'model' or 'state_dict': "
            f"found {_kind(content)}. Save the state dict alone: "
            "torch.save(model.state_dict(), file)."
        )
    named = {key.removeprefix("module."): value for key, value in state.items()}
    bad = [k for k, v in named.items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise NonFiniteWeightsError(f"{name!r} holds NaN or inf in {some(bad)}. Get a sound copy.")
    return named, float(rho) if isinstance(rho, int | float) else None


def _kind(content: Any) -> str:
    if isinstance(content, dict):
        return f"a mapping with {some([repr(key) for key in content])}" if content else "nothing"
    return f"a {type(content).__name__}"


def rename(file: Mapping[str, Tensor], source: Source) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a state dict, and its tensors under the names of a wrapped host."""
    if not any(PREDICTOR.fullmatch(key) for key in file):
        raise CheckpointError(
            f"{os.fspath(source)!r} is no DynamicViT checkpoint: it holds no score_predictor. "
            f"Found {some(list(file))}. Load a dense checkpoint into the host itself. Of the "
            "authors' models, DeiT, LV-ViT and Swin are read; ConvNeXt is no transformer."
        )
    parts = {key.partition(".")[0] for key in file}
    layout: Layout = "swin" if "layers" in parts else "lvvit" if "aux_head" in parts else "deit"
    depths = count_blocks(file)
    weights = {
        _new_name(key, layout, depths): tensor
        for key, tensor in file.items()
        if key.rpartition(".")[2] not in RECOMPUTED
    }
    return layout, weights


def _new_name(key: str, layout: Layout, depths: Sequence[int]) -> str:
    if match := PREDICTOR.fullmatch(key):
        return f"{PREDICTORS}.{match[2]}.{match[3]}_proj.{match[4]}"
    if layout != "swin":
        return key
    if match := LIGHT_BRANCH.fullmatch(key):
        return f"{BYPASSES}.{sum(depths[: int(match[1])]) + int(match[2])}.{match[3]}"
    if match := MERGING.fullmatch(key):
        return f"layers.{int(match[1]) + 1}.downsample.{match[2]}"
    return re.sub(r"^head\.", "head.fc.", key)


def count_blocks(keys: Iterable[str]) -> tuple[int, ...]:
    """How many blocks each level has; a plain host has one level."""
    places = {(int(match[1] or 0), int(match[2])) for key in keys if (match := BLOCK.match(key))}
    levels = 1 + max((level for level, _ in places), default=-1)
    return tuple(sum(place[0] == level for place in places) for level in range(levels))
