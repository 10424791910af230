"""Folders from and to the Hugging Face Hub, on a stand-in; and what a folder of somebody else
cannot do."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

import tokenprune
from tests.product.client_hosts import logits
from tests.product.client_hosts import vit as undescribed
from tests.product.test_sharing import vit, wrapped
from tokenprune.checkpoints.facts import CARD, CERTIFICATE, CONFIG
from tokenprune.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:untrained predictors")


class Hub:
    """Stand-in for huggingface_hub: a folder for each repository, with the calls and keyword
    arguments of `HfApi` and `snapshot_download` that are used."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def HfApi(self, *, token: Any, library_name: str, library_version: str) -> "Hub":
        assert library_name == "tokenprune"
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.root / full).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=full)

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return (self.root / repo_id / filename).exists()

    def hf_hub_download(
        self, repo_id: str, filename: str, *, revision: str | None, local_dir: Path
    ) -> str:
        local_dir.mkdir()
        return str(shutil.copy(self.root / repo_id / filename, local_dir))

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        revision: str | None,
        commit_message: str,
        create_pr: bool,
        delete_patterns: list[str],
        ignore_patterns: list[str] | None,
    ) -> Any:
        for pattern in delete_patterns:
            for file in (self.root / repo_id).glob(pattern):
                file.unlink()
        for file in folder_path.iterdir():
            if file.name not in (ignore_patterns or ()):
                shutil.copy(file, self.root / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **given: Any) -> str:
        assert given["allow_patterns"] == ["*.json", "*.safetensors", "*.yaml", "*.md"]
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("No such repository.\nmore")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    for name in ("HfApi", "snapshot_download"):
        real = getattr(huggingface_hub, name)
        monkeypatch.setattr(huggingface_hub, name, getattr(stand_in, name))
        assert callable(real)
    return stand_in


def test_the_stand_in_has_the_arguments_of_the_client() -> None:
    import inspect

    for name in ("create_repo", "file_exists", "hf_hub_download", "upload_folder"):
        real = inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters
        assert inspect.signature(getattr(Hub, name)).parameters.keys() <= real.keys()
    assert "allow_patterns" in inspect.signature(huggingface_hub.snapshot_download).parameters


def test_push_and_load(hub: Hub) -> None:
    model = wrapped(vit())
    assert model.push_to_hub("mine", certify=False) == "hub/me/mine/commit/1"
    again = tokenprune.load("me/mine", verify=False, train=False)
    assert torch.equal(logits(again), logits(model))
    card = hub.root / "me/mine" / CARD
    first = card.read_text()
    assert 'tokenprune.load("me/mine")' in first
    card.write_text(first + "of an earlier push")
    for mine in ("model_ema.safetensors", CERTIFICATE):
        (card.parent / mine).write_text("mine")
    tokenprune.push_to_hub(model, "me/mine", certify=False)
    assert card.read_text() == first
    assert not (card.parent / CERTIFICATE).exists()
    assert (card.parent / "model_ema.safetensors").exists()
    card.write_text("edited")
    tokenprune.push_to_hub(model, "me/mine", certify=False)
    assert card.read_text() == "edited"
    model.save_pretrained(hub.root / "x", push_to_hub=True, repo_id="me/mine", card=True)
    assert "GMACs" in card.read_text()
    with pytest.raises(CheckpointError, match=r"no folder 'me/none' here.*LocalEntryNotFoundError"):
        tokenprune.load("me/none")


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("{library: timm, model: vit_tiny_patch16_224, kwargs: {checkpoint_path: p}}", "no file"),
        ("{library: transformers, model: vit, kwargs: {trust_remote_code: true}}", "no code"),
        ("{library: transformers, model: FOLDER}", "--host on the command line"),
        ("{library: transformers, model: some/where}", "--host on the command line"),
        ("{library: timm, model: 'hf-hub:some/where'}", "--host on the command line"),
    ],
)
def test_a_recipe_runs_no_code(
    host: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `host` section is of somebody else: no code, no pickle, no download."""
    tokenprune.save(wrapped(undescribed()), tmp_path)
    code = "open('ran', 'w')\nfrom transformers import ViTConfig as Mine"
    (tmp_path / "code.py").write_text(code)
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path.parent)
    with (tmp_path / "recipe.yaml").open("a") as file:
        file.write(f"host: {host.replace('FOLDER', tmp_path.name)}\n")
    with pytest.raises(CheckpointError, match=message):
        tokenprune.load(tmp_path)
    assert not (tmp_path.parent / "ran").exists()
