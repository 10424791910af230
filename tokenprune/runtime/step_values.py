"""What the paths of `steps` are given, and how what they compute is compared."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from tokenprune.private import is_functorch_wrapped_tensor, tree_leaves
from tokenprune.runtime.difference import TOLERANCE, largest
from tokenprune.tracing.arguments import Arguments
from tokenprune.tracing.interpret import Environment
from tokenprune.tracing.stand_ins import is_away, is_plain, is_plain_subclass
from tokenprune.tracing.state import same_values

__all__ = [
    "BEFORE",
    "BEHIND",
    "close",
    "first_tensor",
    "hides_its_node",
    "in_dtype_of",
    "is_elsewhere",
    "is_number",
    "runs_in",
    "shares_memory",
    "with_images",
]

BEFORE, BEHIND = 1, 2
"""Other images of the batch: ours is neither first nor last, nor in the middle, so that turning the
batch around, or reading its first or last image, is seen."""


def first_tensor(arguments: Arguments) -> Tensor:
    return next(iter(arguments.tensors.values()))


def with_images(arguments: Arguments, size: int, images: int, more: bool) -> dict[str, Any]:
    """What graphs are given for so many images; `more` puts others around."""
    generator, found = torch.Generator().manual_seed(0), dict[str, Any]()
    rows = [n % size for n in range(images)]
    rows = [0] * BEFORE + rows + [0] * BEHIND if more else rows
    for name, value in arguments.inputs.items():
        found[name] = value
        if isinstance(value, Tensor):
            given = _plain(value)
            found[name] = several = given[rows] if given.ndim and len(given) == size else given
            if more and several is not given:
                for other in [*several[:BEFORE], *several[-BEHIND:]]:
                    noise = torch.randn(other.shape, generator=generator, device="cpu").to(other)
                    changed = other.flip(-1) if other.ndim else other
                    other.copy_(changed + noise if other.is_floating_point() else changed)
            vars(several).update(vars(value))  # an owner's marks
        elif isinstance(value, list | tuple) and len(value) == size:
            found[name] = [value[n] for n in rows]
    return found


def _plain(tensor: Tensor) -> Tensor:
    """A tensor outside of any transform and of autograd; random numbers in the place of one that
    holds none."""
    if is_plain(tensor) or is_plain_subclass(type(tensor)):
        return tensor.detach()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tuple(tensor.shape), generator=generator, device="cpu")
    drawn = drawn if tensor.is_floating_point() else torch.zeros_like(drawn)
    return drawn.to(tensor.device, tensor.dtype)


def is_elsewhere(held: Any) -> bool:
    """Whether a weight is not there, or belongs to a transform of torch.func."""
    return is_away(held) or (isinstance(held, Tensor) and is_functorch_wrapped_tensor(held))


def hides_its_node(held: Any) -> bool:
    """Whether a weight is elsewhere, or is mostly zeros that training will change: a gate, a
    convolution that begins as the identity."""
    if is_elsewhere(held):
        return True
    known = type(held) is nn.Parameter and is_number(held)
    return known and 2 * int(held.count_nonzero()) <= held.numel()


def in_dtype_of(given: Any, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of another dtype than the arguments of their module, in that one."""
    kind = next((t.dtype for t in tree_leaves(given) if is_number(t)), None)
    other = {n: t for n, t in held.items() if is_number(t) and t.dtype != kind}
    return {} if kind is None else {name: tensor.to(kind) for name, tensor in other.items()}


def is_number(value: Any) -> bool:
    """Whether a value is a tensor of numbers, and not stored in a format that cannot compute; what
    flags and indices do is seen where they are read."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return False
    return value.is_complex() or (value.is_floating_point() and value.dtype.itemsize > 1)


def shares_memory(value: Any, node: fx.Node, env: Environment) -> bool:
    """Whether a tensor is a view of an argument or of the host's, or is one of them."""
    if node.op == "get_attr" or not _has_memory(value):
        return True
    leaves = [leaf for used in node.all_input_nodes for leaf in tree_leaves(env[used])]
    held = {leaf.untyped_storage().data_ptr() for leaf in leaves if _has_memory(leaf)}
    return value.untyped_storage().data_ptr() in held


def _has_memory(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor of one storage; sparse ones have several."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def close(ours: Tensor, theirs: Tensor, rounded: Iterable[torch.dtype]) -> bool:
    """Whether two tensors are equal but for rounding, to the dtypes that were `rounded` to before;
    NaN and inf are equal to themselves."""
    if same_values(ours, theirs):
        return True
    if not is_number(ours):
        return False
    bound = largest(TOLERANCE, (ours.dtype, theirs.dtype, *rounded))
    apart, scale = (ours - theirs).abs().max(), theirs.abs().max().clamp_min(1e-6)
    if bool(scale.isfinite()):  # else something is NaN or inf, perhaps in both
        return bool(apart <= bound * scale)
    finite = theirs.isfinite()
    scale = theirs.where(finite, 0).abs().max().clamp_min(1e-6)
    atol = bound * float(scale)
    return torch.allclose(ours.to(theirs.dtype), theirs, rtol=0.0, atol=atol, equal_nan=True)


def runs_in(root: nn.Module, node: fx.Node) -> nn.Module:
    """The module whose code a node runs, or computes a weight in."""
    found = root
    for name in str(node.target).split(".") if node.op in ("call_module", "get_attr") else ():
        found = found._modules.get(name) or found
    return nn.Module() if found is root else found
