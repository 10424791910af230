"""What timm's vision transformers have in common."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from tokenprune.adapters._facts import has_module, image_inputs, is_class
from tokenprune.arch import ArchSpec
from tokenprune.errors import UnsupportedHostError

__all__ = ["TimmFamily"]


@dataclass(frozen=True, kw_only=True)
class TimmFamily:
    """Adapter of the hosts of one module that follow timm's manners.

    Attributes:
        name: Of the adapter.
        home: Module that defines the host classes.
        classes: Names of the host classes; their subclasses count too.
        block: Name of the block class, where blocks stand in several stages and are counted over
            all of them; None where they are the children of `host.blocks`.
        norm: Path of the final norm over all tokens; may be an `nn.Identity` in a host.
        mode: The mode that serves the family.
    """

    name: str
    home: str
    classes: tuple[str, ...]
    block: str | None = None
    norm: str = "norm"
    mode: Literal["remove", "bypass"] = "remove"

    def matches(self, host: nn.Module) -> bool:
        """Whether a class of the host is one of the family's."""
        return is_class(host, self.home, self.classes)

    def describe(self, host: nn.Module) -> ArchSpec:
        """The facts about `host`.

        Raises:
            UnsupportedHostError: It has no blocks where the family keeps them.
        """
        blocks = self._blocks(host)
        if not blocks:
            raise UnsupportedHostError(
                f"Adapter {self.name!r} found no blocks in {type(host).__name__}. It serves "
                f"{', '.join(self.classes)} of {self.home}; try adapter='generic' or pass an "
                "ArchSpec."
            )
        return ArchSpec(
            adapter=self.name,
            blocks=blocks,
            num_prefix_tokens=int(getattr(host, "num_prefix_tokens", 0)),
            norm=self.norm if has_module(host, self.norm) else None,
            mode=self.mode,
            inputs=image_inputs(host),
        )

    def _blocks(self, host: nn.Module) -> tuple[str, ...]:
        if self.block is not None:
            wanted = [self.block]
            return tuple(p for p, m in host.named_modules() if is_class(m, self.home, wanted))
        if not has_module(host, "blocks"):
            return ()
        names = [name for name, _ in host.get_submodule("blocks").named_children()]
        return tuple(f"blocks.{name}" for name in names)
