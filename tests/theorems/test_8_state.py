"""Theorem 8 of docs/theorems.md: state, checkpoints, copies, compiling."""

import copy
import pickle

import pytest
import torch
from jaxtyping import config

import tokenprune
from tests.theorems.case import Case, same_bits, tensors
from tests.toys.table import TOYS
from tokenprune.scorers.protocol import PREDICTORS


def test_8_state_dict_holds_the_hosts_keys_and_the_predictors(case: Case) -> None:
    case.start(0)
    state = case.model.state_dict()
    own = [key for key in state if key.startswith(f"{PREDICTORS}.")]
    assert [key for key in state if key not in own] == case.keys
    assert {key.split(".")[1] for key in own} == {str(s) for s in range(case.stages)}
    assert list(case.host.state_dict()) == case.keys
    names = [name for name, _ in case.model.named_parameters()]
    theirs = {name: id(p) for name, p in case.host.named_parameters()}
    assert {n: id(p) for n, p in case.model.named_parameters() if n in theirs} == theirs
    assert len(set(names)) == len(names) == len(theirs) + len(own)


def test_8_the_hosts_own_checkpoint_loads(case: Case) -> None:
    checkpoint = case.toy.build(seed=7).state_dict()
    predictors = getattr(case.model, PREDICTORS).state_dict()
    before = {key: value.clone() for key, value in predictors.items()}
    case.model.load_state_dict(checkpoint)
    for key, value in case.host.state_dict().items():
        assert torch.equal(value, checkpoint[key]), key
    after = getattr(case.model, PREDICTORS).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# A copy is told apart by what a host holds, and by where: these hold something else each.
HOLDING = ("prefix_0", "rope", "torchs", "remembers", "shared", "plain_attribute", "caches")
HOLDING += ("caches_globally", "keeps_the_newest", "relative_bias", "attention_pooled")
HOLDING += ("checkpointed", "bfloat16", "timm_vit", "timm_eva", "mean_and_max", "returns_dataclass")


@pytest.mark.parametrize("case", [TOYS[name] for name in HOLDING], indirect=True, ids=HOLDING)
@torch.no_grad()
def test_8_pickled_state_and_copies_keep_outputs(case: Case) -> None:
    case.start(3)
    inputs = case.toy.inputs(2)
    expected = tensors(case.model(**inputs))

    twin = copy.deepcopy(case.model)
    assert same_bits(twin(**inputs), expected)
    for parameter in twin.parameters():
        parameter.zero_()
    assert same_bits(case.model(**inputs), expected)  # nothing is shared
    assert tokenprune.unwrap(twin) is not case.host
    assert tokenprune.unwrap(twin).head.weight is twin.head.weight

    twin.load_state_dict(pickle.loads(pickle.dumps(case.model.state_dict())))
    assert same_bits(twin(**inputs), expected)


@pytest.mark.slow
def test_8_compiled_models_keep_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # the shape checks break the graphs
    toy = TOYS["rope_by_length"]
    model, inputs = toy.wrap(verify=False, train=False), toy.inputs(2)
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(**inputs)  # the first call of a signature traces, which breaks a graph
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(**inputs), expected)
    model.train()
    sets = [torch.arange(8).expand(2, -1), torch.arange(3).expand(2, -1)]
    compiled = torch.compile(model, backend="eager")
    with model.using(keep_indices=sets):
        out = compiled(**inputs)
        assert torch.equal(out, model(**inputs))
    out.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
