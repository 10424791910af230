"""Families of transformers that the generic adapter describes, except for a fact or two."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenprune.adapters._facts import from_module
from tokenprune.adapters.generic import Generic
from tokenprune.hosts.spec import ArchSpec

__all__ = ["Corrected"]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """Adapter of the models that the modeling file `home` defines; `facts` makes fields of
    `ArchSpec` from the host, which replace what the generic adapter found."""

    name: str
    home: str
    facts: Callable[[Any], Mapping[str, Any]]

    def matches(self, host: nn.Module) -> bool:
        """Whether a class of the host comes from the family's modeling module."""
        return from_module(host, self.home)

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`."""
        return replace(Generic().describe(host), adapter=self.name, **self.facts(host))
