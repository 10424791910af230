"""What the vision transformers of timm have in common."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tokenprune.adapters._facts import has_module, image_inputs, is_class
from tokenprune.errors import UnsupportedHostError
from tokenprune.hosts.spec import ArchSpec

__all__ = ["TimmFamily"]


@dataclass(frozen=True, kw_only=True)
class TimmFamily:
    """Adapter of the hosts of one module that are built like timm's.

    Attributes:
        name: Of the adapter.
        home: Module that defines the host classes.
        classes: Names of the host classes; their subclasses count too.
        unless: Attribute that is true on hosts of these classes which the family does not describe.
        block: Name of the block class, with its module if that is another one, where blocks are
            in several stages and are counted over all of them; None where they are the children of
            `host.blocks`.
        last_of: Path of the stages of which only the last one's blocks count; None for all blocks.
        prefix: Prefix tokens that enter the blocks, or the attribute of the host that counts them.
        token_argument: Which tensor argument of a block holds the tokens.
        norm: Path of the final norm over all tokens, which may be an `nn.Identity`; None if there
            is none.
        mode: The mode that fits the family.
    """

    name: str
    home: str
    classes: tuple[str, ...]
    unless: str = ""
    block: str | None = None
    last_of: str | None = None
    prefix: int | str = "num_prefix_tokens"
    token_argument: int = 0
    norm: str | None = "norm"
    mode: Literal["remove", "bypass"] = "remove"

    def matches(self, host: nn.Module) -> bool:
        """Whether a class of the host is one of the family's, and `unless` is false."""
        return is_class(host, self.home, self.classes) and not getattr(host, self.unless, False)

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`."""
        blocks = self._blocks(host)
        if not blocks:
            raise UnsupportedHostError(
                f"Adapter {self.name!r} found no blocks in {type(host).__name__}. It describes "
                f"{', '.join(self.classes)} of {self.home}; try adapter='generic' or pass an "
                "ArchSpec."
            )
        return ArchSpec(
            adapter=self.name,
            blocks=blocks,
            num_prefix_tokens=self._prefix(host),
            class_token=getattr(host, "cls_token", self) is not None,
            norm=self.norm if self.norm and has_module(host, self.norm) else None,
            mode=self.mode,
            token_argument=self.token_argument,
            inputs=image_inputs(host),
        )

    def _prefix(self, host: nn.Module) -> int:
        return self.prefix if isinstance(self.prefix, int) else int(getattr(host, self.prefix, 0))

    def _blocks(self, host: nn.Module) -> tuple[str, ...]:
        if self.block is None:
            blocks = getattr(host, "blocks", nn.Module())
            return tuple(f"blocks.{name}" for name, _ in blocks.named_children())
        stage = ""
        if self.last_of is not None:
            *_, (last, _) = host.get_submodule(self.last_of).named_children()
            stage = f"{self.last_of}.{last}."
        home, _, name = self.block.rpartition(".")
        found = (path for path, m in host.named_modules() if is_class(m, home or self.home, [name]))
        return tuple(path for path in found if path.startswith(stage))
