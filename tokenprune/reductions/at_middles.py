"""Reductions whose stages are in the middle of blocks, where a block's own attention has run."""

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.leaving import leaving_blocks
from tokenprune.hosts.spec import ArchSpec
from tokenprune.reductions.protocol import Reduction
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["AtMiddles"]


class AtMiddles(Reduction):
    """At the entry where a block has no middle; what is read is then of the block before."""

    places: ClassVar[frozenset[str]] = frozenset({"entry", "middle"})

    @classmethod
    def candidates(
        cls, root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
    ) -> tuple[Sequence[int], str]:
        able = leaving_blocks(root, traced, blocks, spec)
        middles = [number for number in able if blocks[number].middle is not None]
        later = [number for number in able if number != min(blocks)]
        alone = later and set(middles) <= {min(blocks)}  # a stage there would be the only one
        return (later if alone else middles), "two blocks"

    @classmethod
    def place(cls, asked: str, blocks: Sequence[Block]) -> str:
        return asked if all(block.middle is not None for block in blocks) else "entry"
