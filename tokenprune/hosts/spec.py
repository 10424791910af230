"""What an adapter says about a host: data, and nothing that looks at the host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ArchSpec", "ExampleInput"]


@dataclass(frozen=True)
class ExampleInput:
    """Shape of one input without its batch dim; how to draw an example of it.

    Attributes:
        shape: Without the batch dim, such as (3, 224, 224).
        high: None for real-valued input; else whole numbers in [0, high) are drawn (token ids).
        ones: True for an input of whole ones (a padding mask).
    """

    shape: tuple[int, ...]
    high: int | None = None
    ones: bool = False


@dataclass(frozen=True, kw_only=True)
class ArchSpec:
    """Facts about one host. What is left out is found in the traced graph.

    Attributes:
        adapter: Name of the adapter that found them.
        blocks: Module paths of the transformer blocks, in the order they run. A block that is run
            again and again (ALBERT's) is named once for each time. Paths that hold a block but are
            no module that is called (`layers.0` of `for attn, ff in layers`) choose among the
            blocks that are found in the graph; none at all takes all of those.
        num_prefix_tokens: P, the class, distillation and register tokens before the patches; None
            counts the tokens at the front that are the same for every image.
        num_suffix_tokens: Tokens after the patches that are no patches (detection tokens): they
            count as patches, and always stay. Counted with the prefix where that is None.
        class_token: The first prefix token, if there is one, is the class token and no register.
        norm: Path of the norm after the last block, if any: its output is `patch_tokens`.
        padding_mask: Name of the argument that says which tokens are real (1) and which only fill
            up (0), if the host takes one. Padded tokens are never kept in place of real ones.
        mode: The mode that fits this host.
        token_argument: Which tensor argument of a block holds the tokens, counted from 0; not the
            first one in hosts with two streams.
        inputs: Argument name -> example, for hosts that are wrapped without `example_inputs`.
        notes: What the adapter found out by itself, for `inspect`.
    """

    adapter: str = "by hand"
    blocks: tuple[str, ...] = ()
    num_prefix_tokens: int | None = None
    num_suffix_tokens: int = 0
    class_token: bool = True
    norm: str | None = None
    padding_mask: str | None = None
    mode: Literal["remove", "bypass"] = "remove"
    token_argument: int = 0
    inputs: Mapping[str, ExampleInput] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tokens_leave(self) -> bool:
        """Whether tokens can be removed, not only skip parts of blocks."""
        return self.mode == "remove"

    @property
    def prefix(self) -> int:
        """P; 0 as long as nobody has counted it."""
        return self.num_prefix_tokens or 0

    @property
    def has_class_token(self) -> bool:
        """There is a class token: the first prefix token."""
        return self.class_token and self.prefix > 0
