"""One row: build a host, wrap it twice, and look at what came of it."""

import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tokenprune
from benchmarks.atlas_parts.row import CERTIFIED, Row, plain
from benchmarks.held_out_parts.host import HeldOut
from tokenprune.errors import TokenPruneError
from tokenprune.runtime.model import pruning_of

__all__ = ["ABSENT", "MERGING", "RAW", "measure"]

MERGING = "merge-k0.7"
RAW, ABSENT = "raw", "absent"
"""Status of a host at which something else was raised than an error of this library; and of one
that its own library cannot build or run."""


def measure(host: HeldOut) -> Row:
    """The row of one host. `mode` is what served it, `certified_at` says whether merging did."""
    row = Row(host.library, host.model, host.module)
    started = time.process_time()
    try:
        torch.manual_seed(0)
        model, inputs = host.make().eval(), host.draw()
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except Exception as error:  # of the library, before anything of ours has run
        row.status, row.reason = ABSENT, plain(f"{type(error).__name__}: {error}")
        return row
    row.kind = type(model).__name__
    _fill(row, model, inputs, host.options)
    row.seconds = round(time.process_time() - started, 1)
    return row


def _fill(row: Row, model: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
    try:
        wrapped = tokenprune.wrap(model, example_inputs=inputs, train=False, **options)
        pruning = pruning_of(wrapped)
        row.adapter, row.mode = pruning.spec.adapter, pruning.method.reduction.name
        row.blocks, row.prefix = len(pruning.spec.blocks), pruning.plan.num_prefix
        row.stages = list(pruning.plan.blocks)
        row.status = CERTIFIED
    except TokenPruneError as error:
        row.refuse(str(error))
        return
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(Path(at.filename).parts[-3:])}:{at.lineno}"
        row.refuse(f"{type(error).__name__} at {where}: {error}")
        row.status = RAW
        return
    try:
        host = tokenprune.unwrap(wrapped)
        tokenprune.wrap(host, MERGING, example_inputs=inputs, train=False, **options)
        row.certified_at = MERGING
    except TokenPruneError:
        row.certified_at = None
    except Exception as error:
        row.refuse(f"{MERGING}: {type(error).__name__}: {error}")
        row.status = RAW
