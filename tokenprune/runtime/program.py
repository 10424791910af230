"""Rewritten graphs as Python functions: one for each path of a traced signature."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tokenprune.analysis.analysis import Analysis, analyse
from tokenprune.analysis.blocks import Blocks
from tokenprune.analysis.plan import Plan
from tokenprune.hosts.spec import ArchSpec
from tokenprune.methods import Method
from tokenprune.reductions import Reduction
from tokenprune.rewrite.passes import run_passes
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.runtime.function import as_function
from tokenprune.runtime.jagged.buckets import Bucketed
from tokenprune.scorers import Scorer
from tokenprune.tracing.host_graph import HostGraph

__all__ = ["Program", "Programs"]

# The host's output, the stage records, the patch tokens, which patches are real (None: all).
Returned = tuple[Any, tuple[tuple[Any, ...], ...], torch.Tensor, torch.Tensor | None]


class Program:
    """One path as a function of (model, settings, inputs).

    It looks modules and parameters up in the model it is given, by path: a head that was replaced
    after the trace is the one that runs, and copies of a model share their programs.
    """

    def __init__(self, rewrite: Rewrite, cut: bool = False) -> None:
        """Make the function of a rewritten graph.

        Args:
            cut: Images keep different numbers of tokens and leave at each stage: the graph is cut
                there and runs in buckets.
        """
        self.rewrite = rewrite
        self.run: Callable[..., Returned] = (
            Bucketed(rewrite, as_function) if cut else as_function(rewrite.graph)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        return self


@dataclass
class Programs:
    """The paths of one traced signature; each is rewritten when first asked for.

    Attributes:
        analysis: What is known about the trace.
        reduction: What becomes of dropped tokens in it.
        scorer: What its stages ask.
        restore: Whether outputs that hold tokens come back in place; None refuses such outputs.
    """

    analysis: Analysis
    reduction: Reduction
    scorer: type[Scorer]
    restore: bool | None
    _made: dict[PathName, Program] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        root: nn.Module,
        traced: HostGraph,
        blocks: Blocks,
        plan: Plan,
        spec: ArchSpec,
        method: Method,
        restore: bool | None,
    ) -> "Programs":
        """Analyse a trace.

        Raises:
            PlanError: A stage sees no patch tokens, or can do nothing.
            UnsupportedHostError: A node cannot run with fewer tokens.
        """
        reduction, scorer = method.reduction, method.scorer
        analysis = analyse(root, traced, blocks, plan, spec, tokens_leave=reduction.removes)
        return cls(analysis, reduction(root, analysis), scorer, restore)

    @property
    def num_patches(self) -> tuple[int, ...]:
        """N of each stage; all the same where tokens leave."""
        return self.analysis.num_patches

    def get(self, root: nn.Module, path: PathName) -> Program:
        """The program of `path`.

        Raises:
            UnsupportedHostError: No rewrite serves this host; the node is named.
        """
        if path not in self._made:
            rewrite = Rewrite(root, self.analysis)
            run_passes(rewrite, self.reduction.passes(path, self.scorer, self.restore))
            cut = path == "jagged" and self.reduction.removes
            self._made[path] = Program(rewrite, cut)
        return self._made[path]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Programs":
        return self
