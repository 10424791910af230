"""Arguments whose contents no graph knows: lists of labels, which a loss module reads for itself.

A list of labels holds other tensors in each call, of other shapes. Where code that cannot be traced
reads it, the list is one input of the graph, and the module that reads it runs for real.
"""

from typing import Any, NoReturn, cast

from torch import fx

__all__ = ["HANDED", "ContentsReadError", "Handed", "HandedProxy"]

HANDED = "handed"
"""Key in the `meta` of a placeholder that is such an argument: its class."""


class ContentsReadError(Exception):
    """Code that is traced looked into a container that a graph only hands on."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"it looks into {name!r}")


class Handed:
    """A container in the place of the leaves that it holds."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"a {type(self.value).__name__}"

    def rows(self, which: slice, batch_size: int) -> "Handed":
        """Those of some images, if it is a list with an entry for each."""
        alike = isinstance(self.value, list | tuple) and len(self.value) == batch_size
        return Handed(self.value[which]) if alike else self


class HandedProxy:
    """What the host's own Python code gets in the place of such an argument."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return cast(type, self.node.meta[HANDED])

    def _looked_into(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ContentsReadError(str(self.node.target))

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ContentsReadError("a list")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._looked_into()

    __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = _looked_into
    __contains__ = __add__ = __radd__ = __eq__ = __ne__ = _looked_into

    def __hash__(self) -> int:
        return hash(self.node)
