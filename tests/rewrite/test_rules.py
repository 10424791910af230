"""`rule`: an operator of somebody else's, in one file; and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tokenprune
from tokenprune.errors import RegistrationError, VerificationError
from tokenprune.ops.pooling import masked_sum
from tokenprune.rewrite import Hiding, Kind, hide_in_reduction, rule

WIDTH, LENGTH = 8, 10
RECIPE = {"version": 1, "schedule": {"blocks": [0, 1], "keep_ratio": 0.6}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step(x)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return torch.logsumexp(x, 1)


def wrap(host: nn.Module) -> Any:
    spec = tokenprune.ArchSpec(
        adapter="by hand", blocks=("blocks.0", "blocks.1"), num_prefix_tokens=1
    )
    example = torch.randn(2, LENGTH, WIDTH)
    return tokenprune.wrap(host.eval(), RECIPE, adapter=spec, example_inputs=example)


def masked_logsumexp(x: Tensor, policy: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    hidden = x.masked_fill((policy < 0.5).unsqueeze(-1), float("-inf"))
    return torch.logsumexp(hidden, dim, keepdim)


def test_a_missing_rule_is_refused_and_a_new_one_heals_it(monkeypatch: Any) -> None:
    from tokenprune.analysis import operators
    from tokenprune.rewrite import rules

    monkeypatch.setattr(operators, "_KINDS", dict(operators._KINDS))
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    with pytest.raises(VerificationError, match=r"differ first at node 'logsumexp'"):
        wrap(Host())
    rule(torch.logsumexp, kind=Kind.POOL)(hide_in_reduction(masked_logsumexp))
    certificate = tokenprune.verify(wrap(Host()), torch.randn(2, LENGTH, WIDTH))
    assert certificate.mask_vs_gather < 1e-4


def test_a_second_rule_for_one_target_is_refused(monkeypatch: Any) -> None:
    from tokenprune.analysis import operators
    from tokenprune.rewrite import rules

    monkeypatch.setattr(operators, "_KINDS", dict(operators._KINDS))
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))

    def leave(hiding: Hiding, node: fx.Node) -> None:
        """Change nothing."""

    for known in (torch.mean, "sum", nn.Softmax):
        with pytest.raises(RegistrationError, match=r"is known already, of kind Kind\.\w+\. Leave"):
            rule(known, kind=Kind.POOL)(leave)
    assert rules.rule_for(nn.Module(), node_of(torch.mean)).hide is not leave  # type: ignore[union-attr]
    rule(torch.mean, kind=Kind.POOL, replace=True)(leave)
    assert rules.rule_for(nn.Module(), node_of(torch.mean)).hide is leave  # type: ignore[union-attr]
    with pytest.raises(RegistrationError, match=r"Kind\.SOFTMAX.* already, of kind Kind\.SOFTMAX"):
        rule(kind=Kind.SOFTMAX)(leave)
    rule(kind=Kind.SOFTMAX, replace=True)(leave)
    assert rules.rule_for(nn.Module(), node_of(torch.softmax)).hide is leave  # type: ignore[union-attr]
    rule(masked_sum, kind=Kind.POOL)(leave)
    assert operators.known_kind(masked_sum) is Kind.POOL


def node_of(target: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), 1))
