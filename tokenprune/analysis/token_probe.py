"""Find which dims of which tensors count tokens, by running a graph with other numbers of them.

No operator is known here by name, but for two kinds that run with tables of any length. The graph
runs on fake tensors with another number of tokens after every stage (a distinct prime more each, so
that each size tells which stage it follows). A dim whose size moved by exactly that number counts
tokens. A node that fails combines tokens with a tensor that was made for all of them (a RoPE table,
a relative-position bias, an attention mask): that tensor is gathered too, and the run goes on.
"""

from collections.abc import Collection, Sequence

import torch
from torch import fx, nn

from tokenprune.analysis.batch_probe import probe_batch
from tokenprune.analysis.facts import Facts, NodeFacts, TokenDim
from tokenprune.analysis.grids import Grid
from tokenprune.analysis.stretch import Stretch
from tokenprune.analysis.token_run import TokenRun
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import quiet_trials

__all__ = ["blocks_that_run", "facts_along", "find_facts"]


@quiet_trials()
def find_facts(
    root: nn.Module,
    traced: HostGraph,
    markers: Sequence[fx.Node],
    grids: Sequence[Grid],
    num_prefix: int,
    padding: Collection[fx.Node],
    tokens_leave: bool,
    stretches: Sequence[Stretch] = (),
) -> tuple[Facts, bool]:
    """One record for each node; and whether the graph holds for its batch size only.

    Args:
        markers: Of the tokens that each stage prunes.
        grids: How they lie there.
        padding: Nodes that hold anything of the host's padding mask.
        tokens_leave: False where every tensor keeps its size.
        stretches: All that reads their tokens outside of them reads all of these; none where those
            that left stay away.

    Raises:
        UnsupportedHostError: A node cannot run with fewer tokens; its place in the host is named.
    """
    with torch.no_grad(), traced.fake_mode:
        facts, bound = probe_batch(root, traced)
    if tokens_leave:
        given = (root, traced, markers, grids, num_prefix, padding)
        return facts_along(*given, facts, stretches), bound
    return facts, bound


@quiet_trials()
def facts_along(
    root: nn.Module,
    traced: HostGraph,
    markers: Sequence[fx.Node],
    grids: Sequence[Grid],
    num_prefix: int,
    padding: Collection[fx.Node],
    facts: Facts,
    stretches: Sequence[Stretch] = (),
    windows: bool = False,
) -> Facts:
    """What is known of each node, and what runs with other numbers of tokens tell; arguments and
    errors as for `find_facts`.

    Args:
        grids: Read where there are stretches.
        windows: Tokens are windows, which may be rows beside those of other images; and numbers
            that equal theirs may be theirs.
    """
    stages = {node: stage for stage, node in enumerate(markers)}
    lengths: dict[fx.Node, dict[int, TokenDim]] = {}
    given = (root, traced, stages, grids, num_prefix, padding, stretches, lengths)
    with torch.no_grad(), traced.fake_mode:
        while True:
            probe = TokenRun(*given, dict(facts), windows=windows)
            if probe.finishes():
                return probe.facts


@quiet_trials()
def blocks_that_run(
    root: nn.Module,
    traced: HostGraph,
    grid: Grid,
    num_prefix: int,
    stretch: Stretch,
    start: fx.Node,
    ends: Sequence[fx.Node],
) -> tuple[int, str]:
    """How many blocks, each given by what it returns, run with another number of tokens from the
    entry `start` of the first one on; and what the next one said."""
    lengths: dict[fx.Node, dict[int, TokenDim]] = {}
    given = (root, traced, {start: 0}, [grid], num_prefix, (), [stretch], lengths)
    with torch.no_grad(), traced.fake_mode:
        while True:
            probe = TokenRun(*given, dict.fromkeys(traced.graph.nodes, NodeFacts()), until=ends[-1])
            try:
                if probe.finishes():
                    return len(ends), ""
            except Exception as error:  # whatever it says: it does not run on some tokens alone
                return sum(end in probe.follows for end in ends), str(error)
