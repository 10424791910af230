"""What `verify` returns: a line for each theorem that was checked on one model."""

from dataclasses import dataclass

from tokenprune.recipe.counting import counts_in_words

__all__ = ["Certificate", "Check"]


@dataclass(frozen=True)
class Check:
    """One theorem on one model: the measured difference, relative to the output's scale, and the
    largest that passes."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN fails


@dataclass(frozen=True)
class Certificate:
    """What `verify` found.

    Attributes:
        host: Class of the host.
        adapter: Adapter that described it.
        mode: The recipe's: what becomes of the other tokens.
        num_patches: N at the first stage.
        patches_per_stage: N of each stage; all the same where tokens leave.
        num_prefix_tokens: P.
        num_keep: K of each stage; with a threshold, what training aims at.
        checks: One entry per theorem that was run. Those whose name ends in "enlivened" were run on
            a copy.
        threshold: Keep probability above which tokens stay; None if each image keeps K.
        enlivened: A leak would not have shown in this model's own outputs, so everything was proven
            again on a copy with random weights and inputs, where it would.
    """

    host: str
    adapter: str
    mode: str
    num_patches: int
    patches_per_stage: tuple[int, ...]
    num_prefix_tokens: int
    num_keep: tuple[int, ...]
    checks: tuple[Check, ...]
    threshold: float | None = None
    enlivened: bool = False

    @property
    def mask_vs_gather(self) -> float:
        """The largest relative difference between mask and gather path; 0 where training runs the
        path of eval, as it does for merging."""
        differences = (c.error for c in self.checks if c.name.startswith("mask = gather"))
        return max(differences, default=0.0)

    def __str__(self) -> str:
        kept = counts_in_words(self.patches_per_stage, self.num_keep)
        if self.threshold is not None:
            kept = f"those above {self.threshold:g} of {self.num_patches}, aiming at {kept}"
        lines = [f"{self.host} ({self.adapter}, {self.mode}): {kept} patch tokens"]
        lines += [f"  {c.name:<44} {c.error:.1e} (bound {c.bound:.0e})" for c in self.checks]
        return "\n".join(lines)
