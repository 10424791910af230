"""Adapter of transformers' wrapper around timm models: the facts of the model inside."""

from dataclasses import replace

from torch import nn

from tokenprune.adapters._facts import from_module, join
from tokenprune.hosts.registry import describe
from tokenprune.hosts.spec import ArchSpec

__all__ = ["ADAPTERS"]

INNER = "timm_model"


class TimmWrapper:
    """Asks the adapter of the model inside, and puts the wrapper's path before its paths."""

    name = "transformers/timm_wrapper"

    def matches(self, host: nn.Module) -> bool:
        """Whether the host is a wrapper."""
        return from_module(host, "transformers.models.timm_wrapper.modeling_timm_wrapper")

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about the model inside."""
        inner = describe(host.get_submodule(INNER))
        example = next(iter(inner.inputs.values()), None)
        return replace(
            inner,
            adapter=self.name,
            blocks=tuple(join(INNER, path) for path in inner.blocks),
            norm=join(INNER, inner.norm) if inner.norm else None,
            inputs={str(host.main_input_name): example} if example else {},
            notes=(f"the model inside is described by adapter {inner.adapter!r}", *inner.notes),
        )


ADAPTERS = (TimmWrapper(),)
