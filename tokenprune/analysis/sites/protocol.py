"""The seam of sites: where in a found block a stage is, and what it can read there."""

from typing import NamedTuple, Protocol

from torch import fx

from tokenprune.analysis.blocks import Attention, Block, Blocks
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Place", "Site"]


class Site(NamedTuple):
    """One stage's place in the host.

    Attributes:
        block: Number of the block.
        place: Name of the place in it.
    """

    block: int
    place: str


class Place(Protocol):
    """A place that every block of a host may have."""

    @property
    def name(self) -> str:
        """As recipes write it."""

    def mark(self, traced: HostGraph, block: Block) -> fx.Node:
        """The marker of the tokens there: all that reads them afterwards reads the marker.

        Raises:
            PlanError: The block has no such place.
        """

    def attention(self, blocks: Blocks, block: Block) -> tuple[Attention | None, str]:
        """The nearest attention that ran before the place, and what to call it in a message."""
