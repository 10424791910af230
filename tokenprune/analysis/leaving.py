"""From which blocks of a host tokens can leave; in a host that keeps a grid, one stretch of it."""

from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.grids import grid_of
from tokenprune.analysis.stretch import Stretch, Stretches, find_runs, stretch_between
from tokenprune.analysis.token_probe import blocks_that_run
from tokenprune.errors import PlanError
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate

__all__ = ["leaving_blocks", "stretch_at"]


def leaving_blocks(
    root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
) -> Sequence[int]:
    """Blocks at which a default recipe may let tokens leave: all; in a host that keeps a grid those
    of the one stretch that costs most, so that most is saved.

    Raises:
        PlanError: There is no stretch; what stands in the way is named.
    """
    if spec.tokens_leave:
        return list(blocks)
    found = find_runs(root, traced, blocks, spec.prefix)
    stretches = list(_stretches(root, traced, found, spec.prefix))
    # no block has looked at the tokens yet that enter the first one, so they do not leave there
    useful = [run[run[0].number == min(blocks) :] for run in stretches]
    best = max(filter(None, useful), key=lambda run: _macs(root, traced, run), default=None)
    if best is None:
        number, reason = min(found.reasons.items())
        raise _refusal(blocks[number], reason, [])
    return [b.number for run in stretches for b in run if best[-1] in run]


def stretch_at(
    root: nn.Module,
    traced: HostGraph,
    blocks: Blocks,
    numbers: Sequence[int],
    markers: Sequence[fx.Node],
    num_prefix: int,
) -> Stretch:
    """The stretch that has stages at blocks `numbers`, from the first one's marker on, as long as
    it can be.

    Raises:
        PlanError: Tokens cannot leave at the first of them, or have to be back before the last.
    """
    found = find_runs(root, traced, blocks, num_prefix)
    run = next((r for r in found.runs if any(b.number == numbers[0] for b in r)), [])
    run = run[[block.number for block in run].index(numbers[0]) :] if run else []
    run = _that_run(root, traced, found, run, num_prefix)
    inside = [block.number for block in run]
    missing = [number for number in numbers if number not in inside]
    if missing:
        before = missing[0] if not run else inside[-1]
        reason = next(found.reasons[n] for n in sorted(found.reasons) if n >= before)
        known = [[b.number for b in r] for r in _stretches(root, traced, found, num_prefix)]
        raise _refusal(blocks[before], reason, known, missing[0] if run else None)
    return stretch_between(traced, markers, run)


def _stretches(
    root: nn.Module, traced: HostGraph, found: Stretches, num_prefix: int
) -> Iterator[list[Block]]:
    """The parts of runs whose blocks run on some of the tokens alone."""
    for run in found.runs:
        start = 0
        while start < len(run):
            able = _that_run(root, traced, found, run[start:], num_prefix)
            if able:
                yield able
            start += max(len(able), 1)


def _that_run(
    root: nn.Module, traced: HostGraph, found: Stretches, run: Sequence[Block], num_prefix: int
) -> list[Block]:
    """The first blocks of a run, as far as they run on some of the tokens alone; why the next one
    does not becomes its reason."""
    if not run:
        return []
    grid = grid_of(root, traced.batch_size, run[0], num_prefix)
    stretch = stretch_between(traced, [run[0].entry], run)
    ends = [block.call.output for block in run if block.call.output is not None]
    count, reason = blocks_that_run(root, traced, grid, num_prefix, stretch, run[0].entry, ends)
    if count < len(run):
        found.reasons[run[max(count - 1, 0)].number] = reason
    return list(run[:count])


def _macs(root: nn.Module, traced: HostGraph, run: Sequence[Block]) -> int:
    """What a run of blocks costs, in multiply-accumulates."""
    nodes = list(traced.graph.nodes)
    first, last = nodes.index(run[0].entry), nodes.index(run[-1].call.output)
    with torch.no_grad(), traced.fake_mode, FlopCounterMode(display=False) as counter:
        for node in nodes[first : last + 1]:
            env = {used: used.meta["val"] for used in node.all_input_nodes}
            evaluate(root, node, env)
    return int(counter.get_total_flops()) // 2


def _refusal(
    block: Block, reason: str, stretches: Sequence[Sequence[int]], later: int | None = None
) -> PlanError:
    where = f"lock {block.number} ('{block.path}')"
    asked = f"B{where} has to keep all its tokens"
    if later is not None:
        asked = (
            f"Tokens that left have to be back after b{where}, before the stage at block {later}"
        )
    able = " or ".join(f"{run[0]} to {run[-1]}" for run in stretches)
    return PlanError(
        f"{asked}: {reason.rstrip('.')}. This host needs `mode: bypass` there, since it keeps a "
        f"grid of tokens. {f'Put all stages into blocks {able}, or use' if able else 'Use'} "
        "`mode: bypass`."
    )
