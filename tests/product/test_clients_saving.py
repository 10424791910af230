"""Copies, pickles, folders of transformers, and what the class of a wrapped model makes."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTForImageClassification

import tokenprune
from tests.product.client_hosts import hf_vit, keeping_all, logits, vit, wrapped
from tokenprune.errors import AlreadyWrappedError, CheckpointError, NotWrappedError


def through_torch_save(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [vit, hf_vit])
def test_torch_save(make: Callable[[], Any]) -> None:
    model = wrapped(make())
    wanted = logits(model)
    again = through_torch_save(model)
    assert torch.equal(logits(again), wanted)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.05)
    assert torch.equal(logits(model), wanted)
    anew = wrapped(make())
    anew.load_state_dict(again.state_dict())
    assert torch.equal(logits(again), logits(anew))
    assert torch.equal(keeping_all(again), logits(tokenprune.unwrap(again)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That save_pretrained wrote."""
    wrapped(hf_vit()).save_pretrained(tmp_path, certify=False)
    return tmp_path


def test_other_folders_are_no_checkpoints_either(tmp_path: Path) -> None:
    hf_vit().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks tokenprune\.json, recipe\.yaml"):
        tokenprune.load(tmp_path, hf_vit())
    (tmp_path / "model.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match=r"lacks tokenprune\.json, recipe\.yaml"):
        tokenprune.load(tmp_path, hf_vit())


def test_a_folder_of_transformers_holds_the_host(folder: Path) -> None:
    host = ViTForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(logits(host), logits(hf_vit()))


def test_class_of_a_wrapped_model_makes_no_wrapped_model(folder: Path) -> None:
    model = wrapped(hf_vit())
    for made in (type(model)(model.config), type(model).from_pretrained(folder)):
        with pytest.raises(NotWrappedError, match=r"Call tokenprune\.wrap\(model, recipe\) on it"):
            logits(made)
        with pytest.raises(NotWrappedError):
            tokenprune.unwrap(made)
        made.load_state_dict(hf_vit().state_dict())
        anew = wrapped(made)
        assert torch.equal(logits(anew), logits(model))
        assert type(tokenprune.unwrap(anew)) is ViTForImageClassification
        assert [type(c(made)) for c in (copy.deepcopy, through_pickle, through_torch_save)] == [
            ViTForImageClassification
        ] * 3
        with pytest.raises(AlreadyWrappedError):
            wrapped(anew)
