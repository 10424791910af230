"""What is known about each node of a traced graph; one record a node."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

__all__ = ["NO_FACTS", "Aligned", "Facts", "NodeFacts", "TokenDim"]


class TokenDim(NamedTuple):
    """One dim that counts tokens: `prefix` rows first, then the patches kept by `stage`."""

    stage: int
    prefix: int


class Aligned(NamedTuple):
    """An argument that was made for all tokens: `dims` maps its token dims to what they count.

    `rank` is the rank of the tensor it is combined with; the gathered tensor is a batch of that
    rank, with `rows_per_image` rows of dim 0 for each image. `folded`: dim 0 counts images times
    tokens, in that order.
    """

    dims: Mapping[int, TokenDim]
    rank: int
    rows_per_image: int = 1
    folded: bool = False


@dataclass(frozen=True)
class NodeFacts:
    """What the probes found out about one node.

    Attributes:
        dims: Its token dims, if it holds tokens.
        folded: One of its dims counts tokens times something else (batch, heads).
        batched: One of its dims counts images, alone or times something else.
        rows_per_image: Rows of dim 0 for each image, if dim 0, and no other, counts images: 1, or
            more where it counts images times something else (heads); None elsewhere.
        follows_tokens: A number that changes with the number of tokens.
        whole_table: A tensor that takes only its size from the tokens: made at full length.
        counts_real: A sum over a padding mask: how many real tokens there are.
        gathers: Argument -> how it must be gathered before this node reads it.
        length_of: The shape of an aligned table, read as numbers: these dims follow the tokens; of
            one number, dim 0.
    """

    dims: Mapping[int, TokenDim] = field(default_factory=dict)
    folded: bool = False
    batched: bool = False
    rows_per_image: int | None = None
    follows_tokens: bool = False
    whole_table: bool = False
    counts_real: bool = False
    gathers: Mapping[fx.Node, Aligned] = field(default_factory=dict)
    length_of: Mapping[int, TokenDim] = field(default_factory=dict)


NO_FACTS = NodeFacts()
Facts = Mapping[fx.Node, NodeFacts]
