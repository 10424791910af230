"""Adapter for all other hosts: looks at the modules, then runs a copy without weights."""

import inspect
import re
from collections.abc import Mapping
from itertools import groupby

from torch import nn

from tokenprune.adapters._blocks import find_stacks
from tokenprune.adapters._facts import (
    climb,
    conv_channels,
    first_argument,
    image_example,
    image_inputs,
    join,
    parent,
)
from tokenprune.adapters._probe import BATCH, Watched, watch
from tokenprune.adapters._signals import image_side, signal_inputs
from tokenprune.adapters._transformers import config_inputs, nearest_config
from tokenprune.hosts.registry import GENERIC, STATED
from tokenprune.hosts.spec import ArchSpec, ExampleInput

__all__ = ["ADAPTERS", "Generic"]

NORMS = ("norm", "layernorm", "ln", "final_norm", "final_layernorm", "post_layernorm", "ln_post")
PREFIX = re.compile(
    r"(cls|class|dist|distillation|reg|register|storage)_?(token|tokens|embedding)", re.IGNORECASE
)
TEXT_LENGTH = 16
MOST_PREFIX = 32
PADDING_MASK = "attention_mask"


class Generic:
    """Describes any host that has a stack of transformer blocks; `verify` tests the result."""

    name = GENERIC

    def matches(self, host: nn.Module) -> bool:
        """Always."""
        return True

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`; `notes` says how they were found. Without blocks, if no list of
        modules holds such as each have an attention and a feed-forward part."""
        stacks = find_stacks(host)
        if not stacks:
            return _without_blocks(
                host,
                "no nn.ModuleList or nn.Sequential holds modules that each have an attention "
                "(query projections) and a feed-forward part",
            )
        stack, *others = stacks
        blocks = stack.blocks
        notes = [f"{stack}, from {blocks[0]}"]
        notes += [f"left out: {other}, from {other.blocks[0]}" for other in others]
        inputs = _inputs(host, blocks[0])
        norm = _norm(host, blocks[-1])
        # hosts read the values of a mask, and on the meta device there are none
        shown = {name: example for name, example in inputs.items() if name != PADDING_MASK}
        seen = watch(host, blocks, norm, shown) if shown else "no input shape is known"
        if isinstance(seen, str):
            notes.append(f"not run without weights, so widths alone decide the mode: {seen}")
            widths = {_width(host.get_submodule(path)) for path in blocks}
            plain = len(widths) == 1
            notes.append(f"widths of the blocks: {sorted(widths)}")
        elif not seen.entered:
            return _without_blocks(host, f"{stack} do not run as modules, from {blocks[0]}")
        else:
            blocks = tuple(path for path, _ in seen.entered)  # in order; what runs twice is twice
            plain = _is_plain(seen)
            if norm is not None and seen.normed != seen.entered[-1][1]:
                notes.append(f"{norm} does not see every token")
                norm = None
            notes.append(_in_words(seen))
        local = next((path for path in blocks if _reads_neighbours(host.get_submodule(path))), None)
        if plain and local:
            plain = False
            notes.append(f"tokens stay on their places: {local} holds a convolution over them")
        prefix, how = _prefix(host, blocks[0], inputs, seen)
        return ArchSpec(
            adapter=self.name,
            blocks=blocks,
            num_prefix_tokens=prefix,
            class_token=_class_token(host),
            norm=norm,
            padding_mask=_padding_mask(host, blocks[0]),
            mode="remove" if plain else "bypass",
            inputs=inputs,
            notes=(*notes, f"{prefix} prefix tokens: {how}"),
        )


def _without_blocks(host: nn.Module, why: str) -> ArchSpec:
    """What is known of a host whose blocks only a trace can show."""
    inputs = _inputs(host, "")
    text = "input_ids" in inputs and "pixel_values" not in inputs
    return ArchSpec(
        adapter=GENERIC,
        num_prefix_tokens=1 if text else None,
        class_token=_class_token(host),
        padding_mask=_padding_mask(host, ""),
        inputs=inputs,
        notes=(why,),
    )


def _inputs(host: nn.Module, block: str) -> Mapping[str, ExampleInput]:
    config = nearest_config(host, block)
    if hasattr(config, "vocab_size") and getattr(host, "main_input_name", "") == "input_ids":
        length = min(TEXT_LENGTH, getattr(config, "max_position_embeddings", TEXT_LENGTH))
        return {
            "input_ids": ExampleInput((length,), high=config.vocab_size),
            PADDING_MASK: ExampleInput((length,), ones=True),
        }
    found = signal_inputs(host, config) or config_inputs(host, config) or image_inputs(host)
    if found:
        return found
    size = getattr(host, "image_size", None) or getattr(host, "img_size", None)
    example = image_example(conv_channels(host) or 3, size)
    return {first_argument(host): example} if example else {}


def _padding_mask(host: nn.Module, block: str) -> str | None:
    """`attention_mask`, if the host takes it and the blocks do not see images: with an image, it is
    the mask of a text."""
    takes = PADDING_MASK in inspect.signature(host.forward).parameters
    return PADDING_MASK if takes and image_side(nearest_config(host, block)) is None else None


def _reads_neighbours(block: nn.Module) -> bool:
    """Whether a block holds a convolution that sees more than one token."""
    return any(
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and max(module.kernel_size) > 1
        for module in block.modules()
    )


def _is_plain(seen: Watched) -> bool:
    shapes = {shape for _, shape in seen.entered}
    batch, *inner = next(iter(shapes))
    return len(shapes) == 1 and len(inner) == 2 and batch == BATCH


def _in_words(seen: Watched) -> str:
    parts = []
    for shape, group in groupby(enumerate(seen.entered), key=lambda item: item[1][1]):
        numbers = [number for number, _ in group]
        parts.append(f"{numbers[0]} to {numbers[-1]} take [B, {', '.join(map(str, shape[1:]))}]")
    return f"run without weights: blocks {'; '.join(parts)}"


def _prefix(
    host: nn.Module, block: str, inputs: Mapping[str, ExampleInput], seen: Watched | str
) -> tuple[int, str]:
    if isinstance(seen, Watched) and seen.grid is not None:
        length = seen.entered[0][1][1] if len(seen.entered[0][1]) == 3 else 0
        height, width = seen.grid
        if 0 <= length - height * width <= MOST_PREFIX:
            return length - height * width, f"{length} tokens less a grid of {height} x {width}"
    path = block
    while path:
        path = parent(path)
        stated = getattr(host.get_submodule(path), STATED, None)
        if isinstance(stated, int):
            return stated, f"{join(path, STATED)} says so"
    if "input_ids" in inputs and "pixel_values" not in inputs:
        return 1, "text encoders pool the first token"
    tokens = _prefix_parameters(host)
    if not tokens:
        return 0, "no parameter looks like a class, distillation or register token"
    count = sum(token.shape[-2] if token.ndim > 1 else 1 for token in tokens.values())
    return count, f"parameters {', '.join(tokens)}"


def _prefix_parameters(host: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in host.named_parameters() if PREFIX.fullmatch(n.rpartition(".")[2])}


def _class_token(host: nn.Module) -> bool:
    """Whether one of its prefix tokens is for the class, as far as names of parameters tell."""
    names = [name.rpartition(".")[2].lower() for name in _prefix_parameters(host)]
    return not names or any("cls" in name or "class" in name for name in names)


def _norm(host: nn.Module, block: str) -> str | None:
    """The nearest norm above the last block that has a usual name."""
    paths = filter(None, (climb(host, block, name) for name in NORMS))
    return max(paths, key=lambda path: path.count("."), default=None)


def _width(block: nn.Module) -> int:
    """Channels that the block's first linear layer or convolution takes."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 0


ADAPTERS = (Generic(),)
