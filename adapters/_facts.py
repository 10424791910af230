"""Small facts about a host, read from its classes, attributes and configuration."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tokenprune.hosts.inputs import parameters_of
from tokenprune.hosts.spec import ExampleInput

__all__ = [
    "climb",
    "conv_channels",
    "first_argument",
    "from_module",
    "has_module",
    "image_example",
    "image_inputs",
    "is_class",
    "join",
    "parent",
]


def is_class(module: nn.Module, home: str, names: Iterable[str]) -> bool:
    """Whether `module` is an instance of one of the classes `names` that the module `home` defines.

    Compares names, so the library that defines the class need not be importable.
    """
    wanted = set(names)
    return any(c.__module__ == home and c.__name__ in wanted for c in type(module).__mro__)


def from_module(module: nn.Module, home: str) -> bool:
    """Whether `module` is an instance of any class that the module `home` defines."""
    return any(c.__module__ == home for c in type(module).__mro__)


def has_module(host: nn.Module, path: str) -> bool:
    """Whether `host` has a module at the dotted `path`."""
    try:
        host.get_submodule(path)
    except AttributeError:
        return False
    return True


def parent(path: str) -> str:
    """Path of the module that holds the one at `path`; "" is the host."""
    return path.rpartition(".")[0]


def join(*parts: str) -> str:
    """Dotted path of the parts that are not empty."""
    return ".".join(filter(None, parts))


def climb(host: nn.Module, path: str, name: str) -> str | None:
    """Path of the child called `name` of the nearest module above `path` that has one."""
    while path:
        path = parent(path)
        if has_module(host, join(path, name)):
            return join(path, name)
    return None


def first_argument(host: nn.Module) -> str:
    """Name of the first argument of `host.forward`."""
    return parameters_of(host.forward, type(host))[0].name


def image_example(channels: int, size: Any) -> ExampleInput | None:
    """An image of `size` (side, or height and width, in pixels); None if there is no such size."""
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(sides):
        return None
    return ExampleInput((channels, int(sides[0]), int(sides[1])))


def conv_channels(module: nn.Module) -> int | None:
    """Channels that the first convolution in `module` takes."""
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d))
    return next((convolution.in_channels for convolution in convolutions), None)


def image_inputs(host: nn.Module) -> dict[str, ExampleInput]:
    """Input of a host built like timm's: of the size it was built for, else of its weights."""
    embed = getattr(host, "patch_embed", None)
    configured = getattr(host, "pretrained_cfg", None) or getattr(host, "default_cfg", None) or {}
    usual = tuple(configured.get("input_size") or ())
    built_size = getattr(embed, "img_size", None)
    channels = conv_channels(embed if isinstance(embed, nn.Module) else host)
    channels = channels or (usual[0] if usual else 3)
    example = image_example(channels, built_size) or image_example(channels, usual[1:])
    return {first_argument(host): example} if example else {}
