"""Modules that decide by what tensors hold: one node, which runs the module itself.

They come before the first block (SigLIP 2 resizes its position embeddings to the size of each
image) or after the last one (a loss that matches boxes with labels). Under fake tensors they cannot
run; what they return has the example's form.
"""

from typing import Any, NamedTuple

from torch import Tensor

from tokenprune.errors import HostError
from tokenprune.private import DataDependentOutputException, tree_map
from tokenprune.tracing.draws import DRAW, DrawRead
from tokenprune.tracing.handed import ContentsReadError
from tokenprune.tracing.provenance import Provenance
from tokenprune.tracing.proxy import ArrayReadError

__all__ = ["DATA_DEPENDENT", "LEAVE_OUT", "OPAQUE", "AsTraced", "Opaque", "reason_of"]

OPAQUE = "opaque"
"""Key in the `meta` of such a node."""
LEAVE_OUT = "leave the labels out and compute it from the model's output"
DATA_DEPENDENT = (
    "Python asks for a value of a tensor, which differs from call to call. Decide by tensors "
    f"(torch.where); if this is a loss that matches predictions with labels, {LEAVE_OUT}"
)


class Opaque(NamedTuple):
    """Why a module is one node.

    Attributes:
        where: The line of the host's source that asks what a tensor holds.
        reason: Why that cannot be traced.
        batch_size: The number of images in the trace.
    """

    where: Provenance
    reason: str
    batch_size: int


class AsTraced:
    """A node's target: hands on what such a module returned, if it has the traced form."""

    def __init__(self, traced: Any, batch_size: int) -> None:
        self.form, self.batch_size = _form(traced), batch_size
        self.__name__ = self.__qualname__ = "as_traced"  # what the code of a graph calls it

    def __call__(self, value: Any, images: Tensor) -> Any:
        """`value`; `images` is an input, which has as many rows as there are images.

        Raises:
            HostError: It has another form: what follows was traced for that one.
        """
        found = _form(value)
        if not self._fits(found, self.form, images.shape[0]):
            raise HostError(
                f"A module whose code decides by values returned {found}, but {self._traced()} "
                "when it was traced. Wrap the host with an input like this one; or leave out what "
                "that module is for: labels, if it is a loss."
            )
        return value

    def _fits(self, found: Any, form: Any, batch_size: int) -> bool:
        if type(found) is not type(form):
            return False
        if isinstance(form, _Shape):
            first = {*form[:1], *([batch_size] if form[:1] == (self.batch_size,) else [])}
            alike = len(found) == len(form) and found[1:] == form[1:]
            return alike and (not form or found[0] in first)
        if isinstance(form, dict):
            same = found.keys() == form.keys()
            return same and all(self._fits(found[key], form[key], batch_size) for key in form)
        if isinstance(form, list | tuple):
            pairs = zip(found, form, strict=False)
            return len(found) == len(form) and all(self._fits(*pair, batch_size) for pair in pairs)
        return bool(found == form)

    def _traced(self) -> Any:
        """The form, with B for the number of images."""

        def said(leaf: Any) -> Any:
            if not isinstance(leaf, _Shape) or leaf[:1] != (self.batch_size,):
                return leaf
            return _Said(f"({', '.join(['B', *map(str, leaf[1:])])})")

        return tree_map(said, self.form)


class _Shape(tuple[int, ...]):
    """A tensor's shape, told from containers."""

    __slots__ = ()


class _Said(str):
    """A shape in a message."""

    __slots__ = ()
    __repr__ = str.__str__


def _form(value: Any) -> Any:
    """Containers with the shapes of the tensors in them."""
    return tree_map(lambda leaf: _Shape(leaf.shape) if isinstance(leaf, Tensor) else leaf, value)


def reason_of(error: Exception) -> str | None:
    """Why code that asks for values cannot be traced; None if `error` is another one."""
    if isinstance(error, DrawRead):
        return DRAW
    if isinstance(error, ContentsReadError):
        return f"{error}, which is another in each call"
    values = isinstance(error, DataDependentOutputException | ArrayReadError)
    return DATA_DEPENDENT if values else None
