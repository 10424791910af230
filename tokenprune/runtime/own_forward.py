"""A forward that is set on a wrapped model, as accelerate does.

It is in a class of its own: an attribute of the object would be the host's too, which shares it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

__all__ = ["OWN", "forward_set", "set_forward", "with_forward"]

OWN = "_own_forward"
"""Where such a class has what was set."""


def with_forward(cls: type[nn.Module], given: Callable[..., Any]) -> type[nn.Module]:
    """The class of a model whose forward is `given`; its own one, if that is put back."""
    base = cls.__mro__[1] if OWN in vars(cls) else cls
    if getattr(given, "__func__", None) is vars(base)["forward"]:
        return base

    @wraps(given)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return given(*args, **kwargs)

    names = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "forward": forward,
        OWN: (given,),
    }
    return type(base.__name__, (base,), names)


def forward_set(model: nn.Module) -> Callable[..., Any] | None:
    """What was set; None if nothing was."""
    (given,) = vars(type(model)).get(OWN, (None,))
    return given  # type: ignore[no-any-return]


def set_forward(model: nn.Module, given: Callable[..., Any]) -> None:
    """For pickle: set it on the model that was loaded."""
    model.forward = given
