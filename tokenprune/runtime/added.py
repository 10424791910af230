"""The modules that `wrap` adds to a host, which a change of the host may leave behind."""

from collections.abc import Mapping

from torch import nn

from tokenprune.errors import HostError
from tokenprune.hosts.inputs import first_floating
from tokenprune.reductions import MODES, Reduction
from tokenprune.scorers.protocol import PREDICTORS
from tokenprune.tracing.stand_ins import is_plain

__all__ = ["added_names", "check_parts", "check_place"]


def added_names() -> tuple[str, ...]:
    """First parts of the state-dict keys that `wrap` may add to a host's."""
    added = dict.fromkeys(name for reduction in MODES.values() for name in reduction.added)
    return (PREDICTORS, *added)


def check_place(host: nn.Module, added: Mapping[str, nn.Module]) -> None:
    """Refuse a host that was moved or cast by itself: what `wrap` added stayed behind."""
    ours = next((p for m in added.values() for p in m.parameters()), None)
    theirs = first_floating(host)
    if ours is None or not (is_plain(ours) and is_plain(theirs)):
        return
    if (ours.device, ours.dtype) == (theirs.device, theirs.dtype):
        return
    held = {(p.device, p.dtype) for p in host.parameters()}  # it may be spread out
    if (ours.device, ours.dtype) not in held:
        raise HostError(
            f"{type(host).__name__} is {theirs.dtype} on {theirs.device} now, but what wrap added "
            f"({', '.join(added)}) is {ours.dtype} on {ours.device}. Move and cast the wrapped "
            f'model, not its host: model.to("{theirs.device}", {theirs.dtype}).'
        )


def check_parts(host: nn.Module, added: Mapping[str, nn.Module], reduction: Reduction) -> None:
    """Refuse a host with more blocks than it had when `wrap` added a part for each."""
    wanted = reduction.modules(device="meta") if added else {}
    for name, parts in wanted.items():
        had = [key for key, _ in added[name].named_children()]
        lacking = [key for key, _ in parts.named_children() if key not in had]
        if lacking:
            raise HostError(
                f"{type(host).__name__} has changed since wrap: it would need {name}.{lacking[0]} "
                f"for block {lacking[0]}, but wrap made {name} for blocks {', '.join(had)}. Call "
                "tokenprune.unwrap(model) and wrap the host again."
            )
