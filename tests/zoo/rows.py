"""A row of the zoo: how a host is built, what it takes, and how its weights are made to matter."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

__all__ = [
    "APART",
    "BYPASS",
    "CLASSES",
    "RECIPE",
    "THREE",
    "TWO",
    "Row",
    "images",
    "over",
    "randomize_weights",
    "restored",
]

CLASSES = 7
# Stages that leave 0.6, 0.36, ... of the patches. One right at the start lets a test put anything
# into the pixels of dropped patches; the other recipes have dense blocks first. Hosts have no more
# blocks than their stages need, but for the core rows: wrapping takes time by the block.
RECIPE: dict[str, Any] = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.6}}
APART: dict[str, Any] = {"version": 1, "schedule": {"blocks": [0, 2], "keep_ratio": 0.6}}
TWO: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
THREE = {"version": 1, "schedule": {"blocks": [1, 2, 3], "keep_ratio": 0.6}}
BYPASS = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}, "mode": "bypass"}


def images(batch: int, size: int, argument: str) -> dict[str, Tensor]:
    """Random images, the same in every run."""
    generator = torch.Generator().manual_seed(batch)
    return {argument: torch.randn(batch, 3, size, size, generator=generator)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One host.

    Attributes:
        name: Unique; the id of its tests.
        family: The adapter that must describe it.
        make: Builds it.
        num_blocks: How many blocks the adapter must find.
        num_prefix: P, the prefix tokens it must find.
        sizes: Image sides it takes, in pixels, the one it is built for first.
        argument: Name of its image argument.
        recipe: A recipe that fits it.
        mode: The mode that serves it.
        refused: What the engine says (a regular expression) if it cannot prune it.
        num_tokens: N where the stages are, if that is not told by the size of an image.
        final_tokens: Tokens after the last block, if the host pools them after the stages.
        patch: Side in pixels of the square that one token stands for where the stages are.
        one_patch_one_token: No patch token depends on pixels outside its square.
        exact_in_double: It computes in double precision if its weights are double.
        draw: Makes an example input, where it is more than images.
        core: It is among the few that `make test-fast` runs, and that every behaviour is tested on.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    num_prefix: int
    num_blocks: int = 2
    sizes: tuple[int, ...] = (32,)
    argument: str = "x"
    recipe: dict[str, Any] = field(default_factory=lambda: RECIPE)
    mode: str = "remove"
    refused: str = ""
    num_tokens: int | None = None
    final_tokens: int | None = None
    patch: int = 8
    exact_in_double: bool = True
    one_patch_one_token: bool = True
    draw: Callable[[int, int, str], dict[str, Tensor]] = images
    core: bool = False

    @property
    def library(self) -> str:
        """Where the host comes from."""
        return self.family.partition("/")[0] if "/" in self.family else "other"

    def build(self, factor: float | None = None, seed: int = 0) -> nn.Module:
        """A fresh host in eval mode; with random weights if `factor` is given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            host = self.make()
            if factor is not None:
                randomize_weights(host, factor)
        return host.eval()

    @property
    def stages(self) -> int:
        """Stages of the recipe."""
        return len(self.recipe["schedule"]["blocks"])

    def num_patches(self, size: int | None = None) -> int:
        """N where the stages are, for images of `size`."""
        return self.num_tokens or ((size or self.sizes[0]) // self.patch) ** 2

    def inputs(self, batch: int = 2, size: int | None = None) -> dict[str, Tensor]:
        """The host's arguments for `batch` images."""
        return self.draw(batch, size or self.sizes[0], self.argument)


def over(rows: Iterable[Row]) -> pytest.MarkDecorator:
    """Run a test on each of some rows."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in rows])


@contextmanager
def restored(model: nn.Module, factor: float | None = None) -> Iterator[None]:
    """Give all weights, buffers and modes back afterwards; until then they are random if `factor`
    is given."""
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        if factor is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                randomize_weights(model, factor)
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(saved[name])
        model.zero_grad()
        for module, training in modes:
            module.training = training


def randomize_weights(host: nn.Module, factor: float) -> None:
    """Make errors visible: sharp attention, and no parameter at a value that hides one.

    Query and key projections (fused ones as a whole) get scale 0.02, as libraries initialise them,
    times `factor`; other linear layers keep the scale of what they take. LayerScale and norm
    weights become random in (0.5, 1.5); biases, prefix tokens, position embeddings and tables of
    relative positions become random of scale 0.1 to 0.5.
    """
    with torch.no_grad():
        for path, module in host.named_modules():
            own = path.rpartition(".")[2]
            for name, parameter in module.named_parameters(recurse=False):
                _randomize(type(module).__name__, own, name, parameter, factor)


QUERY_KEY = {"qkv", "q", "k", "kv", "query", "key", "q_proj", "k_proj", "in_proj", "in_proj_weight"}
SCALES = ("gamma", "lambda", "scale")
TABLES = (
    "pos_emb",
    "position",
    "rel_pos",
    "relative",
    "token",
    "probe",
    "class_embedding",
    "latent",
)


def _randomize(kind: str, own: str, name: str, parameter: nn.Parameter, factor: float) -> None:
    if "Norm" in kind:
        parameter.uniform_(0.5, 1.5) if name == "weight" else parameter.normal_(std=0.2)
    elif name.startswith(SCALES) or kind == "LayerScale":
        parameter.uniform_(0.5, 1.5)
    elif any(word in name for word in TABLES) or kind == "Embedding":
        parameter.normal_(std=0.5)
    elif name.endswith("bias"):
        parameter.normal_(std=0.1)
    elif (own in QUERY_KEY or name in QUERY_KEY) and parameter.ndim == 2:
        parameter.normal_(std=0.02 * factor)
    elif "Linear" in kind:
        parameter.normal_(std=parameter.shape[1] ** -0.5)
