"""Modules of torch's that return what they are given."""

from torch import nn

__all__ = ["is_idle", "may_be_idle"]

DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


def may_be_idle(module: nn.Module) -> bool:
    """Whether `is_idle` depends on the module's mode."""
    return type(module) in DROPOUTS


def is_idle(module: nn.Module) -> bool:
    """Whether a call with one tensor returns it, as long as the module's class, its mode and its
    own `forward` are what they are."""
    plain = type(module) is nn.Identity or (may_be_idle(module) and not module.training)
    return plain and "forward" not in vars(module)
