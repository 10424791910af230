"""From which blocks of a host tokens can leave; in a host that keeps a grid, in stretches."""

from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations_with_replacement

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.analysis.blocks import Block, Blocks
from tokenprune.analysis.grids import grid_of
from tokenprune.analysis.prefix import OwnTokens, own_at
from tokenprune.analysis.stretch import Stretch, Stretches, find_runs, stretch_between
from tokenprune.analysis.token_probe import blocks_that_run
from tokenprune.errors import PlanError
from tokenprune.hosts.registry import GENERIC
from tokenprune.hosts.spec import ArchSpec
from tokenprune.tracing.host_graph import HostGraph
from tokenprune.tracing.interpret import evaluate

__all__ = ["costliest_stretch", "default_sites", "leaving_blocks", "stretches_at"]


def leaving_blocks(
    root: nn.Module, traced: HostGraph, blocks: Blocks, spec: ArchSpec
) -> Sequence[int]:
    """Blocks at which a recipe may let tokens leave: all; in a host that keeps a grid those of its
    stretches.

    Raises:
        PlanError: There is no stretch; what prevents it is named.
    """
    if spec.tokens_leave:
        return list(blocks)
    found = find_runs(root, traced, blocks, spec.prefix)
    stretches = list(_stretches(root, traced, found, spec.prefix))
    if spec.adapter == GENERIC and stretches:  # else its adapter counted the prefix tokens
        stretches = _of_one_prefix(root, traced, blocks, stretches)
    able = [block.number for run in stretches for block in run]
    # no block has looked yet at the tokens that enter the first one, so none leaves there
    if not set(able) - {min(blocks)}:
        alone = (min(blocks), "it is the only block, and nothing has looked at them yet")
        number, reason = min(found.reasons.items(), default=alone)
        raise _refusal(blocks[number], reason)
    return able


def _of_one_prefix(
    root: nn.Module, traced: HostGraph, blocks: Blocks, stretches: Sequence[list[Block]]
) -> list[list[Block]]:
    """The stretches before which the same tokens are no patches as before the costliest one."""
    own = own_at(root, traced, blocks, [run[0].number for run in stretches])
    best = max(stretches, key=lambda run: _macs_of(root, traced, run, min(blocks)))
    none = OwnTokens(0, 0)
    wanted = own.get(best[0].number, none)
    return [run for run in stretches if own.get(run[0].number, none) == wanted]


def default_sites(
    root: nn.Module,
    traced: HostGraph,
    blocks: Blocks,
    num_prefix: int,
    able: Collection[int],
    shares: Sequence[float],
) -> list[int]:
    """The blocks of the stages of a default recipe in stretches: of all ways to part the stages
    among them, the one that saves most.

    In a stretch the first stage is at its start, if other blocks have run before and so have looked
    at the tokens; the others at equal distances.

    Args:
        able: Blocks that can have one.
        shares: The kept share of tokens after each stage.
    """
    runs = _parts(root, traced, blocks, num_prefix, able)
    costs = {block.number: _macs(root, traced, block) for run in runs for block in run}

    def saved(chosen: Sequence[Block]) -> float:
        total, left = 0.0, iter(shares)
        for run in runs:
            share = 1.0
            for block in run:
                share = next(left) if block in chosen else share
                total += costs[block.number] * (1 - share)
        return total

    ways = combinations_with_replacement(range(len(runs)), len(shares))
    parted = (
        [_spread(run, way.count(i), min(blocks)) for i, run in enumerate(runs)] for way in ways
    )
    best = max((list(chain(*sites)) for sites in parted), key=saved)
    return [block.number for block in best]


def costliest_stretch(
    root: nn.Module, traced: HostGraph, blocks: Blocks, num_prefix: int, able: Collection[int]
) -> list[int]:
    """Those of the blocks `able` that are in the stretch with most MACs."""
    runs = _parts(root, traced, blocks, num_prefix, able)
    best = max(runs, key=lambda run: _macs_of(root, traced, run, min(blocks)))
    return [block.number for block in best]


def _parts(
    root: nn.Module, traced: HostGraph, blocks: Blocks, num_prefix: int, able: Collection[int]
) -> list[list[Block]]:
    """The blocks `able` by stretch."""
    found = find_runs(root, traced, blocks, num_prefix)
    runs = [[block for block in run if block.number in able] for run in found.runs]
    return [run for run in runs if run and run[-1].number != min(blocks)]


def _spread(run: Sequence[Block], count: int, first: int) -> list[Block]:
    """As many blocks of a run at equal distances, without the first block of the host."""
    parts = range(1, count + 1) if run[0].number == first else range(count)
    places = (max(run[0].number == first, len(run) * part // (parts.stop or 1)) for part in parts)
    return [run[place] for place in dict.fromkeys(places)]


def stretches_at(
    root: nn.Module,
    traced: HostGraph,
    blocks: Blocks,
    numbers: Sequence[int],
    markers: Sequence[fx.Node],
    num_prefix: int,
) -> tuple[Stretch, ...]:
    """The stretches that have stages at blocks `numbers`, each from its first marker on, as long as
    it can be.

    Raises:
        PlanError: Tokens cannot leave at one of them.
    """
    found, stretches = find_runs(root, traced, blocks, num_prefix), list[Stretch]()
    stage = 0
    while stage < len(numbers):
        number = numbers[stage]
        run = next((r for r in found.runs if blocks[number] in r), [])
        run = run[run.index(blocks[number]) :] if run else []
        run = _that_run(root, traced, found, run, num_prefix)
        inside = [block.number for block in run]
        stages = [s for s in range(stage, len(numbers)) if numbers[s] in inside]
        if not stages:
            able = [[b.number for b in r] for r in _stretches(root, traced, found, num_prefix)]
            raise _refusal(blocks[number], found.reasons[number], able)
        stretches.append(stretch_between(traced, {s: markers[s] for s in stages}, run))
        stage = stages[-1] + 1
    return tuple(stretches)


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
    stretch = stretch_between(traced, {0: run[0].entry}, run)
    ends = [block.call.output for block in run if block.call.output is not None]
    count, reason = blocks_that_run(root, traced, grid, num_prefix, stretch, run[0].entry, ends)
    if count < len(run):
        found.reasons[run[max(count - 1, 0)].number] = reason
    return list(run[:count])


def _macs_of(root: nn.Module, traced: HostGraph, run: Sequence[Block], first: int) -> int:
    """What a run costs, without the first block of the host, at which no token leaves."""
    return sum(_macs(root, traced, block) for block in run if block.number != first)


def _macs(root: nn.Module, traced: HostGraph, block: Block) -> int:
    """What a block costs, in multiply-accumulates."""
    with torch.no_grad(), traced.fake_mode, FlopCounterMode(display=False) as counter:
        for node in block.call.nodes():
            evaluate(root, node, {used: used.meta["val"] for used in node.all_input_nodes})
    return int(counter.get_total_flops()) // 2


def _refusal(block: Block, reason: str, stretches: Sequence[Sequence[int]] = ()) -> PlanError:
    able = " or ".join(f"{run[0]} to {run[-1]}" for run in stretches)
    return PlanError(
        f"Block {block.number} ('{block.path}') has to keep all its tokens: {reason.rstrip('.')}. "
        "This host needs `mode: bypass` there, since it keeps a grid of tokens. "
        f"{f'Put stages at blocks {able}, or use' if able else 'Use'} `mode: bypass`."
    )
