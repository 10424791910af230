"""Rewritten graphs as Python functions: one for each path of a traced signature."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.analysis.analysis import Analysis
from tokenprune.errors import HostError
from tokenprune.private import without_modes
from tokenprune.reductions import Reduction
from tokenprune.rewrite.pack_rows import PackRows
from tokenprune.rewrite.passes import run_passes
from tokenprune.rewrite.rewrite import Rewrite
from tokenprune.rewrite.settings import PathName
from tokenprune.rewrite.unread import LeaveUnread
from tokenprune.runtime.function import as_function
from tokenprune.runtime.jagged import Jagged
from tokenprune.scorers import Scorer
from tokenprune.tracing.effects import Store
from tokenprune.tracing.guards import HOOKS_OF, Guards, Watched
from tokenprune.tracing.hook_nodes import closing, is_hook_node
from tokenprune.tracing.stand_ins import forget_weights

__all__ = ["Program", "Programs"]

# The host's output, the stage records, the patch tokens (None where unread rows are left out),
# which patches are real (None: all).
Returned = tuple[Any, tuple[tuple[Any, ...], ...], Any, Tensor | None]

LOOKS = 2
"""After how many calls of new programs what they have changed is looked at."""


class Program(NamedTuple):
    """A rewritten graph, and `run`, which computes it: a function of (model, settings, inputs).

    It looks modules and parameters up in the model it is given, by path: a head that was replaced
    after the trace is the one that runs.
    """

    rewrite: Rewrite
    run: Callable[..., Returned]
    hooked: bool


@dataclass
class Programs:
    """The paths of one traced signature; each is rewritten when first asked for.

    Attributes:
        analysis: What is known about the trace.
        reduction: What becomes of dropped tokens in it.
        scorer: What its stages ask.
        restore: Whether outputs that hold tokens come back in place; None refuses such outputs.
        unread_rows: Rows that nobody reads are left out.
        proven: `wrap` or `verify` proves them, or `prove_steps` has done so.
    """

    analysis: Analysis
    reduction: Reduction
    scorer: type[Scorer]
    restore: bool | None
    unread_rows: bool
    proven: bool = False
    number: int = 0
    """Which of its model's programs these are, from 1."""
    hooks_seen: int | None = None
    """The number of the next hook of all, when the guards were last looked at."""
    changes: Watched | None = None
    """What the host's own forward reads and changes in each call."""
    _made: dict[tuple[PathName, bool], Program] = field(default_factory=dict)
    _looks: int = LOOKS

    def check_hooks(self, host: str, of: nn.Module | None = None) -> None:
        """To be called after a call that ran hooks, or in one after the pre-hooks `of` a module,
        whose forward hooks may restore what those changed.

        Raises:
            HostError: One has changed what the host's code reads, perhaps later in that call.
        """
        if of is None and self.guards.hold():
            return
        changed = self.guards.changed(of, _matters)
        if changed is None:
            return
        targets = (node.target for node in self.analysis.traced.graph.nodes)
        own = {(id(t.owner), t.name) for t in targets if isinstance(t, Store)}
        if (id(changed.owner), changed.name) not in own:
            raise HostError(
                f"A hook inside of {host} changed {changed.name!r} of a "
                f"{type(changed.owner).__name__}, which the host's code reads. A call runs what "
                "was traced before it began: change it between calls, or in a hook of the whole "
                "model."
            )

    def look_after(self) -> None:
        """To be called after a call: see whether that has changed what the trace depends on."""
        if not torch.compiler.is_compiling() and self._looks:
            self._looks -= 1
            self.changes = self.changes or self.guards.changed()

    @property
    def guards(self) -> Guards:
        """What else than its inputs the trace depends on."""
        return self.analysis.traced.guards

    @property
    def serve_copies(self) -> bool:
        """Whether they run on a copy of the host too: no node holds a module of this one."""
        nodes = self.analysis.traced.graph.nodes
        return not any(is_hook_node(node) or isinstance(node.target, Store) for node in nodes)

    @property
    def num_patches(self) -> tuple[int, ...]:
        """N of each stage; all the same in one stretch where tokens leave."""
        return self.analysis.num_patches

    @property
    def starts(self) -> Collection[int]:
        """The stages that choose among all tokens."""
        stages = range(len(self.num_patches))
        return self.analysis.starts if self.reduction.nested else stages

    def get(self, root: nn.Module, path: PathName, whole: bool = False) -> Program:
        """The program of `path`; `whole`, if all rows are to be computed, the patch tokens too.

        Raises:
            UnsupportedHostError: No rewrite serves this host; the node is named.
        """
        left_out = self.unread_rows and not whole
        if (path, left_out) not in self._made:
            with without_modes():  # nodes are tried on fake tensors, which are not the caller's
                self._made[path, left_out] = self._make(root, path, left_out)
        return self._made[path, left_out]

    def _make(self, root: nn.Module, path: PathName, left_out: bool) -> Program:
        passes = [*self.reduction.passes(path, self.scorer, self.restore)]
        if left_out:
            passes.append(LeaveUnread(self.reduction.unread(root)))
        rewrite = Rewrite(root, self.analysis)
        run: Callable[..., Returned] = as_function(run_passes(rewrite, passes), root)
        if path == "jagged" and self.reduction.removes:
            packed = Rewrite(root, self.analysis)
            run_passes(packed, [*passes, PackRows()])
            run = Jagged(run, as_function(packed.graph, root), rewrite.graph)
        forget_weights(self.analysis.traced.fake_mode)
        hooked = any(map(is_hook_node, rewrite.graph.nodes))
        run = closing(run) if hooked else run
        return Program(rewrite, run, hooked)


def _matters(watched: Watched) -> bool:
    """Whether a call that runs goes wrong if a hook changes this: one may take itself away."""
    if watched.name != HOOKS_OF:
        return True
    state, *_ = watched.look(watched.table, watched.name, None)
    return bool(state > watched.expected[0])
