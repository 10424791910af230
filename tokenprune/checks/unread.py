"""Theorem 13: without the rows that nobody reads, the outputs are the same."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tokenprune.checks.certificate import Check
from tokenprune.checks.proof import Theorems
from tokenprune.ops.moving import first_rows
from tokenprune.rewrite.settings import SETTINGS, PathName
from tokenprune.runtime.difference import TOLERANCE, difference, largest
from tokenprune.tracing.interpret import evaluate, run, tensors_in

__all__ = ["leaves_out", "other_rows", "unread"]

EXACT = 1e-12
# Smaller than elsewhere: only shapes of products differ, and only in the last block.
BOUNDS = {**TOLERANCE, torch.float64: EXACT, torch.float32: 1e-5}


def leaves_out(proof: Theorems) -> bool:
    """Whether programs leave rows out in which something is multiplied."""
    programs = proof.programs
    return programs.unread_rows and programs.reduction.unread(proof.host).costly


@torch.no_grad()
def unread(proof: Theorems) -> Iterator[Check]:
    """The check, on the paths of training and eval."""
    if leaves_out(proof):
        yield proof.compared(
            "without unread rows the outputs are the same",
            _with_and_without,
            lambda _: "rows that `unread_rows` leaves out are read (leave it out of the recipe)",
            (largest(BOUNDS, proof.dtypes), EXACT),
        )


def _with_and_without(proof: Theorems) -> float:
    paths: list[PathName] = [proof.pruned]
    if proof.programs.reduction.hides:
        paths.append("mask")
    return max(
        difference(proof.run_whole_or_not(path, False), proof.run_whole_or_not(path, True))
        for path in paths
    )


@torch.no_grad()
def other_rows(proof: Theorems) -> float:
    """How far the outputs move if the last rows are read in the place of the first."""

    def step(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.target is not first_rows:
            return evaluate(proof.model, node, env)
        source, (_, dim, rows) = env[node.all_input_nodes[0]], node.args
        return source.narrow(dim, source.shape[dim] - rows, rows)

    graph = proof.programs.get(proof.host, proof.pruned).rewrite.graph
    *_, (_, returned) = run(proof.model, graph, {SETTINGS: proof.settings, **proof.given}, step)
    return difference(tensors_in(returned[0]), proof.run_pruned())
