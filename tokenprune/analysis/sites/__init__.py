"""Where in a block a stage is: one file a place."""

from tokenprune.analysis.sites.entry import Entry
from tokenprune.analysis.sites.middle import Middle
from tokenprune.analysis.sites.protocol import Place, Site

__all__ = ["PLACES", "Entry", "Middle", "Place", "Site"]

PLACES: dict[str, Place] = {place.name: place for place in (Entry(), Middle())}
