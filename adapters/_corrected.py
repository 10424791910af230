"""Families that the generic adapter describes, all but a fact or two."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tokenprune.adapters._facts import from_module
from tokenprune.adapters.generic import ADAPTER as GENERIC
from tokenprune.hosts.spec import ArchSpec

__all__ = ["Corrected"]


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """Adapter of the models that one modeling file of transformers defines.

    Attributes:
        name: Of the adapter.
        home: The modeling module.
        facts: What to say instead of what the generic adapter found: fields of `ArchSpec`, made
            from the host and what was found.
    """

    name: str
    home: str
    facts: Callable[[Any, ArchSpec], Mapping[str, Any]]

    def matches(self, host: nn.Module) -> bool:
        """Whether a class of the host comes from the family's modeling module."""
        return from_module(host, self.home)

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`.

        Raises:
            UnsupportedHostError: The generic adapter finds no blocks.
        """
        found = GENERIC.describe(host)
        return replace(found, adapter=self.name, **self.facts(host, found))
