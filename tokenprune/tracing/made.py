"""Modules that a host's forward makes in each call, as one node: a loss that it makes of its
settings."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.private import tree_leaves
from tokenprune.tracing.proxy import ValueProxy

__all__ = ["Made"]


class Made:
    """A node's target: a module that was made in a trace, without the tensors that it holds.

    Attributes:
        proxies: Of the tensors, which are given to each call.

    Raises:
        NotImplementedError: It holds one inside of a list or dict.
    """

    def __init__(self, module: nn.Module) -> None:
        self.__name__ = self.__qualname__ = type(module).__name__  # in the code of a graph
        self.proxies = list[ValueProxy]()
        self._module = _with_others(module, self._taken)
        left = [held for each in self._module.modules() for held in vars(each).values()]
        if any(type(leaf) is ValueProxy for leaf in tree_leaves(left)):
            raise NotImplementedError(
                f"a {type(module).__name__} that forward makes, with tensors in a list or dict"
            )

    def _taken(self, held: Any) -> Any:
        if type(held) is not ValueProxy:
            return held
        self.proxies.append(held)
        return Taken(len(self.proxies) - 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *given: Any) -> Any:
        return self.run(*given)

    def run(
        self, tensors: tuple[Tensor, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the module returns, with `tensors` in the places of the proxies."""
        put_back = lambda held: tensors[held.place] if type(held) is Taken else held  # noqa: E731
        return _with_others(self._module, put_back)(*args, **kwargs)


class Taken:
    """Stands where a tensor was."""

    def __init__(self, place: int) -> None:
        self.place = place


def _with_others(module: nn.Module, other: Callable[[Any], Any]) -> nn.Module:
    """A module of the same attributes, but for what `other` puts in their places."""
    alike = object.__new__(type(module))
    held = vars(alike)
    held.update({name: other(value) for name, value in vars(module).items()})
    for kind in ("_parameters", "_buffers"):
        held[kind] = {name: other(value) for name, value in held[kind].items()}
    children = held["_modules"].items()
    held["_modules"] = {n: None if c is None else _with_others(c, other) for n, c in children}
    return alike
