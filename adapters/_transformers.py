"""What the vision models of transformers have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from tokenprune.adapters._facts import climb, from_module, image_example, is_class, parent
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec, ExampleInput

__all__ = ["TransformersFamily", "config_inputs", "nearest_config", "text_inputs"]


def nearest_config(host: nn.Module, path: str) -> Any:
    """Configuration of the nearest module at or above `path` that has one; None if none has."""
    while (config := getattr(host.get_submodule(path), "config", None)) is None and path:
        path = parent(path)
    return config


def text_inputs(host: nn.Module) -> dict[str, ExampleInput]:
    """The text that a host with two towers (such as CLIP) takes with the image, or {}."""
    if getattr(host, "main_input_name", None) != "input_ids":
        return {}
    config: Any = host.config
    text = getattr(config, "text_config", None)
    if text is None:
        return {}
    return {"input_ids": ExampleInput((text.max_position_embeddings,), high=text.vocab_size)}


def config_inputs(host: nn.Module, config: Any) -> dict[str, ExampleInput]:
    """Input of a host whose image part has the configuration `config`."""
    image = image_example(getattr(config, "num_channels", 3), getattr(config, "image_size", None))
    if image is None:
        return {}
    text = text_inputs(host)
    main = "pixel_values" if text else str(getattr(host, "main_input_name", "pixel_values"))
    return {**text, main: image}


@dataclass(frozen=True, kw_only=True)
class TransformersFamily:
    """Adapter of the models that one modeling file of transformers defines.

    Attributes:
        name: Of the adapter.
        home: The modeling module.
        block: Name of its block class. Blocks of a text tower do not count.
        prefix: P, or a function that reads it from the configuration of the image part.
        norm: Name of the final norm over all tokens, a child of a module above the blocks; None if
            there is none, or it sees the pooled token only.
        padding_mask: Argument that says which patches are real.
        mode: The mode that fits the family.
        inputs: Overrides `config_inputs`.
        marks: Attribute that the configuration of an image part has, and a text part's has not.
    """

    name: str
    home: str
    block: str
    prefix: int | Callable[[Any], int]
    norm: str | None = "layernorm"
    padding_mask: str | None = None
    mode: Literal["remove", "bypass"] = "remove"
    inputs: Callable[[nn.Module, Any], Mapping[str, ExampleInput]] = config_inputs
    marks: str = "patch_size"

    def matches(self, host: nn.Module) -> bool:
        """Whether a class of the host comes from the family's modeling module."""
        return from_module(host, self.home)

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`."""
        layers = (p for p, m in host.named_modules() if is_class(m, self.home, [self.block]))
        blocks = tuple(p for p in layers if hasattr(nearest_config(host, p), self.marks))
        if not blocks:
            raise UnsupportedHostError(
                f"Adapter {self.name!r} found no {self.block} that works on image patches in "
                f"{type(host).__name__}. It prunes the patches of the image models of {self.home}. "
                "Use adapter='generic', or pass an ArchSpec."
            )
        config = nearest_config(host, blocks[0])
        return ArchSpec(
            adapter=self.name,
            blocks=blocks,
            num_prefix_tokens=self.prefix if isinstance(self.prefix, int) else self.prefix(config),
            norm=climb(host, blocks[0], self.norm) if self.norm else None,
            padding_mask=self.padding_mask,
            mode=self.mode,
            inputs=self.inputs(host, config),
        )
