"""Fill one row: wrap a model at full size without weights, then verify it with weights."""

import time
import traceback
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

import tokenprune
from benchmarks.atlas_parts.row import CERTIFIED, Row
from benchmarks.atlas_parts.weights import enliven, parameters_in_millions, weightless
from tokenprune.checks.verify import Certificate
from tokenprune.errors import TokenPruneError
from tokenprune.hosts.registry import describe
from tokenprune.hosts.spec import ArchSpec

__all__ = ["Host", "measure"]

# Hosts below both are verified at full size.
SMALL_PARAMETERS, SMALL_GMACS = 30.0, 6.0


class Host(Protocol):
    """A model of the atlas: how to build it."""

    @property
    def library(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def restore(self) -> bool: ...

    def build(self) -> nn.Module:
        """At full size."""
        ...

    def build_smaller(self) -> tuple[nn.Module, str]:
        """A smaller build of the same class, and its changes as text."""
        ...

    def inputs(self, host: nn.Module) -> dict[str, Any] | None:
        """A batch of two, or None if the adapter knows the inputs."""
        ...


def measure(host: Host) -> Row:
    """The row of one model; never raises: an error becomes the row's reason."""
    row = Row(host.library, host.model, host.module)
    started = time.process_time()
    try:
        torch.manual_seed(0)
        _fill(row, host)
    except TokenPruneError as error:
        row.refuse(str(error))
    except ImportError as error:
        row.refuse(f"its library cannot build it here: {error}")
    except Exception as error:  # the atlas continues: the error is the row
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(Path(at.filename).parts[-3:])}:{at.lineno}"
        row.refuse(f"unexpected {type(error).__name__} at {where}: {error}")
    row.seconds = round(time.process_time() - started, 1)
    return row


def _fill(row: Row, host: Host) -> None:
    full = weightless(host.build)
    row.kind, row.parameters = type(full).__name__, round(parameters_in_millions(full), 2)
    small = row.parameters < SMALL_PARAMETERS
    if small:  # the verified model is the counted one
        full = enliven(host.build().eval())
    spec = describe(full)
    row.adapter, row.mode = spec.adapter, spec.mode
    row.prefix, row.blocks = spec.num_prefix_tokens, len(spec.blocks)
    before = time.process_time()
    inputs = host.inputs(full)
    wrapped = _wrap(host, full, spec, inputs)
    row.wrap_seconds = round(time.process_time() - before, 2)
    counted = tokenprune.profile(wrapped, inputs)
    row.tokens, row.stages = counted.num_patches, list(counted.stages)
    row.gmacs_dense, row.gmacs_pruned = round(counted.dense_gmacs, 4), round(counted.gmacs, 4)
    if small and counted.dense_gmacs < SMALL_GMACS:
        _certify(row, tokenprune.verify(wrapped, inputs, gradients=False), "full")
        return
    smaller, changes = host.build_smaller()
    smaller = enliven(smaller.eval())
    other = describe(smaller)
    if (other.adapter, other.mode) != (spec.adapter, spec.mode):
        row.refuse(
            f"not proven: the smaller build is described by {other.adapter!r} as {other.mode}, the "
            f"full one by {spec.adapter!r} as {spec.mode}"
        )
        return
    inputs = host.inputs(smaller)
    proof = _wrap(host, smaller, other, inputs)
    _certify(row, tokenprune.verify(proof, inputs, gradients=False), f"reduced: {changes}")


def _wrap(host: Host, model: nn.Module, spec: ArchSpec, inputs: dict[str, Any] | None) -> Any:
    """Wrap with the default recipe."""
    return tokenprune.wrap(
        model, adapter=spec, example_inputs=inputs, restore=host.restore, verify=False
    )


def _certify(row: Row, certificate: Certificate, at: str) -> None:
    exact = next(c for c in certificate.checks if c.name == "keep_ratio 1 is the host")
    paths = next(c for c in certificate.checks if c.name.startswith("mask = gather"))
    row.certificate = {
        "max_error": certificate.mask_vs_gather,
        "precision": "float64" if "float64" in paths.name else "float32",
        "keep_one_exact": exact.error == 0.0,
    }
    row.certified_at, row.status = at, CERTIFIED
