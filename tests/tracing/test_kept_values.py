"""Settings that a host keeps in buffers, and that its Python code decides by."""

import copy

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.tracing.test_functions import RECIPE, Block
from tokenprune.errors import TraceError


class Host(nn.Module):
    """EoMT anneals the chance of a mask in this way."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        chances = torch.ones(3)
        self.chances = nn.Parameter(chances) if learned else nn.Buffer(chances)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.chances[number] > 0:
                x = x * (1 + self.chances[number].item())
        return x.mean(1)


SPEC = tokenprune.ArchSpec(
    adapter="test", blocks=("blocks.0", "blocks.1", "blocks.2"), num_prefix_tokens=0
)


def test_another_value_is_seen() -> None:
    torch.manual_seed(0)
    host, x = Host().eval(), torch.randn(2, 6, 8)
    dense = copy.deepcopy(host)
    model = tokenprune.wrap(host, RECIPE, example_inputs=x, adapter=SPEC)
    model.set_keep_ratio(1.0)
    for chance in (1.0, 0.0, 2.0, 1.0):
        model.chances[1] = dense.chances[1] = chance
        with torch.no_grad():
            assert torch.equal(model(x, return_trace=True)[0], dense(x))
    assert model._pruning.cache.info().programs == 4  # one of them in training mode


def test_a_weight_changes_in_each_step() -> None:
    with pytest.raises(TraceError, match="Python asks for a value of a tensor"):
        tokenprune.wrap(Host(learned=True).eval(), RECIPE, example_inputs=torch.randn(2, 6, 8))
