"""What has to hold for every host of `hosts_grid.py`, wrapped without a recipe."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.zoo.hosts_grid import GRID
from tests.zoo.rows import Row, over, restored
from tokenprune.errors import LeakError
from tokenprune.runtime.added import added_names
from tokenprune.runtime.model import pruning_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
BOUND = 1e-4  # of the output's scale, in fp32
CORE = [row for row in GRID if row.core]
SHARP = [*CORE, *GRID[::4]]  # `test_zoo.py` has the core rows of hosts whose tokens leave


@lru_cache(maxsize=1)
def wrapped(row: Row) -> tuple[nn.Module, Any]:
    """A host and its wrapped model, which tests leave as they found them."""
    host = row.build(1.0)
    train = not statistics_hold_dropped(row, host)
    model = tokenprune.wrap(host, example_inputs=row.inputs(), verify=False, train=train)
    return host, model.eval()


def statistics_hold_dropped(row: Row, host: nn.Module) -> bool:
    """Whether a batch norm would see what dropped tokens say, so that training is refused."""
    return row.mode == "remove" and any(isinstance(m, NORMS) for m in host.modules())


def random_sets(model: Any, row: Row, batch: int, seed: int) -> list[Tensor]:
    """Kept sets of random sizes; each inside the one before where tokens leave."""
    generator = torch.Generator().manual_seed(seed)
    patches = model._pruning.programs(row.inputs(batch)).num_patches
    sets: list[Tensor] = []
    for total in patches:
        nested = bool(sets) and row.mode == "remove"
        start = sets[-1] if nested else torch.arange(total).expand(batch, -1)
        count = int(torch.randint(1, start.shape[1] + 1, (), generator=generator))
        order = torch.rand(start.shape, generator=generator).argsort(dim=1)[:, :count]
        sets.append(start.gather(1, order).sort(dim=1).values)
    return sets


def logits(output: Any) -> Tensor:
    """The first tensor of what a host returns."""
    output = output[0] if isinstance(output, tuple) else output
    return getattr(output, "logits", output)


@over(GRID)
def test_the_adapter_finds_the_facts_and_the_certificate_holds(row: Row) -> None:
    _, model = wrapped(row)
    certificate = tokenprune.verify(model, row.inputs())
    assert all(check.passed for check in certificate.checks), str(certificate)
    if row in SHARP:
        with restored(model, 50.0):
            assert tokenprune.verify(model, row.inputs(), gradients=False).mask_vs_gather < BOUND
    assert (certificate.adapter, certificate.mode) == (row.family, row.mode)
    assert certificate.num_prefix_tokens == row.num_prefix
    assert len(pruning_of(model).spec.blocks) == row.num_blocks
    counted = tokenprune.profile(model)
    assert sum(counted.macs_per_block) < sum(counted.dense_macs_per_block)


@over(CORE)
@torch.no_grad()
def test_paths_agree_for_any_kept_sets_and_batch(row: Row) -> None:
    host, model = wrapped(row)
    for batch in (1, 3):
        inputs, sets = row.inputs(batch), random_sets(model, row, batch, seed=batch)
        with model.using("gather", keep_indices=sets):
            gathered = logits(model(**inputs))
        with model.using("mask", keep_indices=sets):
            masked = logits(model(**inputs))
        scale = gathered.abs().max()
        assert (masked - gathered).abs().max() < BOUND * scale
        if batch == 3:
            alone = {name: value[1:2] for name, value in inputs.items()}
            with model.using("gather", keep_indices=[kept[1:2] for kept in sets]):
                assert (logits(model(**alone)) - gathered[1:2]).abs().max() < BOUND * scale
            with model.using("dense"):
                dense = logits(model(**inputs))
            assert torch.equal(dense, logits(host(**inputs)))
            assert not torch.equal(gathered, dense)  # something was pruned


@over([row for row in GRID if row.core or row.mode == "remove"])
def test_training_reaches_everything_that_was_added(row: Row) -> None:
    """In `test_the_adapter_finds_the_facts` the certificate says so of every row."""
    host, model = wrapped(row)
    with restored(model):
        model.train()
        if statistics_hold_dropped(row, host):
            with pytest.raises(LeakError, match="takes batch statistics over dropped tokens"):
                model(**row.inputs())
            for module in model.modules():
                module.train(module.training and not isinstance(module, NORMS))
            model(**row.inputs())
            model.train()  # an epoch later, and nobody froze them again
            with pytest.raises(LeakError, match="takes batch statistics over dropped tokens"):
                model(**row.inputs())
            for module in model.modules():
                module.train(module.training and not isinstance(module, NORMS))
        out, trace = model(**row.inputs(), return_trace=True)
        (logits(out).square().mean() + sum(s.decision.mean() for s in trace.stages)).backward()
        for name, parameter in model.named_parameters():
            if name.startswith(added_names()):
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
