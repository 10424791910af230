"""What hooks do in a call of a pruned model, and what of it nobody has proven."""

from dataclasses import dataclass

from torch import nn

from tokenprune.notices import warn_once
from tokenprune.runtime.program import Programs
from tokenprune.tracing.hook_nodes import Hook, name_of

__all__ = ["HooksOfCall"]


@dataclass(frozen=True)
class HooksOfCall:
    """Told by `hook_nodes.hooks_told`.

    Attributes:
        host: Whose modules have the hooks.
        programs: Of the call.
        proven: Hooks of smaller numbers were there when the model was wrapped or verified.
    """

    host: nn.Module
    programs: Programs
    proven: int

    def before(self, module: nn.Module) -> None:
        """Raise HostError if a pre-hook changed what the module's code reads."""
        self.programs.check_hooks(type(self.host).__name__, module)

    def is_new(self, number: int) -> bool:
        """Whether the model was wrapped or verified without it."""
        return number >= self.proven

    def changed(self, path: str, hook: Hook) -> None:
        """Warn of a hook that no proof has seen; torch's own (FSDP's) mix no tokens."""
        name, line = name_of(hook), getattr(getattr(hook, "__code__", None), "co_firstlineno", "")
        if name.startswith("torch."):
            return
        warn_once(
            self.host,
            f"hook {name}:{line}".removesuffix(":"),
            f"It changes values of module '{path}' of this {type(self.host).__name__}, and was "
            "registered after the model was wrapped or verified. A hook that computes one token "
            "from others (their mean) reads tokens that are dropped, or fewer of them, and no "
            "analysis sees that. Call tokenprune.verify(model), which proves the model with its "
            "hooks.",
        )

    def done(self) -> None:
        """Raise HostError if a hook changed what the host's code reads."""
        self.programs.check_hooks(type(self.host).__name__)
