"""The toy hosts that the engine must prune: every theorem is tested on each of them.

A toy is data: how to build it, its prefix tokens, what it takes. The zoo has real models.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokenprune
from tests.toys import odd_blocks as blocks
from tests.toys import odd_hosts as odd
from tests.toys import vit
from tests.toys.vit import PATCH, SIZES, Block, Vit, pixels, randomize_weights
from tokenprune.hosts.spec import ArchSpec

__all__ = ["GAPS", "TOYS", "Toy"]


def only_pixels(batch: int, size: int, seed: int) -> dict[str, Tensor]:
    return {"x": pixels(batch, size, seed)}


def pixels_and_mask(batch: int, size: int, seed: int) -> dict[str, Tensor]:
    real = torch.ones(batch, (size // PATCH) ** 2, dtype=torch.bool)
    real[-1, 5:9] = False
    return {"x": pixels(batch, size, seed), "real": real}


@dataclass(frozen=True)
class Toy:
    """One toy host.

    Attributes:
        name: Unique.
        make: Builds it.
        prefix: P.
        sizes: Image sides that it takes.
        draw: (batch, size, seed) -> its arguments.
        dtype: Of its weights and inputs.
        blocks: Where its stages stand. Before the first block a test can put anything into dropped
            tokens, by way of the pixels.
        depth: How many blocks it has; at most those of `make`.
        noisy: It draws random numbers while training.
        images_alone: An image's output does not depend on the others, in the host itself.
        described: False to let the shipped adapters find the facts.
        core: It is among the few that `make test-fast` runs.
    """

    name: str
    make: Callable[[], nn.Module]
    prefix: int = 1
    sizes: tuple[int, ...] = SIZES[:1]
    draw: Callable[[int, int, int], dict[str, Tensor]] = only_pixels
    dtype: torch.dtype = torch.float32
    blocks: tuple[int, int] = (0, 1)
    depth: int = 2
    noisy: bool = False
    images_alone: bool = True
    described: bool = True
    core: bool = False

    def build(self, seed: int = 0, factor: float = 1.0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            host: Any = self.make()
            del host.blocks[self.depth :]
            randomize_weights(host, factor)
        built: nn.Module = host.to(self.dtype).eval()
        return built

    def inputs(self, batch: int = 2, size: int = SIZES[0], seed: int = 0) -> dict[str, Tensor]:
        drawn = self.draw(batch, size, seed)
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in drawn.items()
        }

    @property
    def recipe(self) -> dict[str, Any]:
        return {"version": 1, "schedule": {"blocks": list(self.blocks), "keep_ratio": 0.6}}

    @property
    def facts(self) -> ArchSpec | None:
        if not self.described:
            return None
        return ArchSpec(
            adapter="by hand",
            blocks=tuple(f"blocks.{i}" for i in range(self.depth)),
            num_prefix_tokens=self.prefix,
            norm="norm",
        )

    def wrap(self, host: nn.Module | None = None, **options: Any) -> Any:
        """This toy, wrapped and verified."""
        given = {"adapter": self.facts, "example_inputs": self.inputs(), **options}
        return tokenprune.wrap(host or self.build(), self.recipe, **given)


def mean_and_max(x: Tensor) -> Tensor:
    return x[:, 1:].mean(1) + x[:, 1:].amax(dim=1)


def _attending(name: str, attention: Callable[[], nn.Module], prefix: int = 1, **rest: Any) -> Toy:
    return Toy(name, partial(Vit, prefix, partial(Block, attention)), prefix, **rest)


def timm_model(name: str, **options: Any) -> nn.Module:
    """A model of timm's registry with three blocks of 32 channels."""
    import timm  # here, since the tests that need no timm should not wait for it

    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return timm.create_model(name, num_classes=5, **small, **options)


BOTH: dict[str, Any] = {"sizes": SIZES}
# One block is before the first stage, or between the stages.
BEFORE: dict[str, Any] = {"blocks": (1, 2), "depth": 3}
BETWEEN: dict[str, Any] = {"blocks": (0, 2), "depth": 3}
_ALL = (
    Toy("prefix_0", partial(Vit, 0), 0, SIZES),
    Toy("prefix_1", partial(Vit, 1), 1, **BEFORE),
    Toy("prefix_2", partial(Vit, 2), 2),
    Toy("prefix_9", partial(Vit, 9), 9, **BEFORE),
    _attending("eager", blocks.Eager, noisy=True, core=True, **BETWEEN),
    _attending("by_hand", blocks.ByHand),
    _attending("talking_heads", blocks.TalkingHeads),
    _attending("causal", blocks.Causal, 0),
    _attending("one_key_head", blocks.OneKeyHead),
    _attending("torchs", blocks.Torchs),
    _attending("rope", blocks.Rope),
    _attending("rope_by_length", blocks.RopeByLength, core=True, **BOTH, **BETWEEN),
    _attending("relative_bias", blocks.RelativeBias, 0, noisy=True, core=True, **BETWEEN),
    _attending("query_key_norm", blocks.QueryKeyNorm),
    Toy("in_place", partial(Vit, 1, blocks.InPlace)),
    Toy("position_each_time", partial(Vit, 1, blocks.PositionEachTime), **BOTH),
    Toy("remembers", partial(Vit, 1, blocks.Remembers)),
    Toy("mean_of_patches", partial(odd.Pooled, lambda x: x[:, 1:].mean(dim=(1,)), 1)),
    Toy("max_first", partial(odd.Pooled, lambda x: x.max(1)[0], 0), 0),
    Toy("mean_and_max", partial(odd.Pooled, mean_and_max, 1), core=True, **BETWEEN),
    Toy("attention_pooled", odd.AttentionPooled, 0),
    Toy("class_attention", odd.ClassAttention, 0),
    Toy(
        "bool_mask",
        partial(odd.Masked, vit.Attention, additive=False),
        draw=pixels_and_mask,
        core=True,
        **BOTH,
        **BETWEEN,
    ),
    Toy(
        "additive_mask",
        partial(odd.Masked, blocks.Eager, additive=True),
        draw=pixels_and_mask,
        noisy=True,
    ),
    Toy("by_keyword", odd.ByKeyword),
    Toy("returns_dict", partial(odd.Returns, lambda a, b: {"logits": a, "pooled": [(b, None)]})),
    Toy("returns_dataclass", partial(odd.Returns, odd.Both)),
    Toy("python_ints", odd.PythonInts, **BOTH),
    Toy("shared", odd.Shared),
    Toy("plain_attribute", odd.PlainAttribute),
    Toy("long_skip", odd.LongSkip, **BETWEEN),
    Toy("checkpointed", odd.Checkpointed, **BETWEEN),
    Toy("one_image_branch", odd.OneImageBranch, images_alone=False),
    Toy("float64", Vit, dtype=torch.float64),
    Toy("bfloat16", partial(Vit, 1, partial(Block, blocks.ByHand)), dtype=torch.bfloat16),
    Toy(
        "timm_vit",
        partial(timm_model, "deit3_small_patch16_224", dynamic_img_size=True, reg_tokens=2),
        3,
        SIZES,
        described=False,
        core=True,
        **BETWEEN,
    ),
    Toy(
        "timm_eva",
        partial(timm_model, "vit_small_patch16_dinov3", dynamic_img_size=True),
        5,
        SIZES,
        described=False,
        **BEFORE,
    ),
    Toy("max_values", partial(odd.Pooled, lambda x: torch.max(x, dim=1).values, 0), 0),
    Toy("caches", odd.Caches, **BOTH),
    Toy("caches_globally", odd.CachesGlobally, **BOTH),
    Toy("keeps_the_newest", odd.KeepsTheNewest, **BOTH),
)
TOYS: dict[str, Toy] = {toy.name: toy for toy in _ALL}

# What the engine does not do yet: a strict xfail each, until the toy can move up.
GAPS: dict[str, tuple[Toy, str]] = {
    "in_place_at_entry": (
        Toy("in_place_at_entry", partial(Vit, 1, blocks.InPlaceAtEntry)),
        "the predictor keeps the tokens for its backward, and the block then writes into them",
    ),
}
