"""Folders that others read: the dense host by its own library, the whole model by `load` alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset

import tokenprune
from tests.product.client_hosts import IMAGES, RECIPE, hf_vit, logits
from tests.product.client_hosts import vit as undescribed
from tests.product.client_hosts import wrapped as wrapped_anew
from tokenprune.checkpoints.facts import ADDED, CARD, CERTIFICATE, CONFIG, FACTS, WEIGHTS
from tokenprune.errors import (
    CheckpointError,
    HostError,
    MissingDependencyError,
    NotWrappedError,
    VerificationError,
)
from tokenprune.runtime.model import pruning_of

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore:untrained predictors")


def vit(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 5, **options})


def wrapped(host: nn.Module, recipe: Any = RECIPE) -> Any:
    """Wrapped, with predictors that prefer some tokens."""
    model = tokenprune.wrap(host.eval(), recipe, verify=False, train=False)
    torch.manual_seed(1)
    for parameter in model.token_predictors.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def dense(model: Any) -> torch.Tensor:
    return logits(tokenprune.unwrap(model))


@pytest.fixture(scope="module", params=["timm", "transformers"])
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(library: str) -> Any:
    """No test changes it."""
    return wrapped(vit() if library == "timm" else hf_vit())


@pytest.fixture(scope="module")
def shared(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    folder: Path = model.save_pretrained(
        tmp_path_factory.mktemp("shared") / "deit-pruned",
        images=IMAGES,
        card={"license": "apache-2.0"},
    )
    return folder


def load_dense(library: str, folder: Path) -> Any:
    if library == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    host, report = transformers.ViTForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or drawn at random
    return host.eval()


def test_a_folder_is_the_model_and_the_dense_host(library: str, model: Any, shared: Path) -> None:
    again = tokenprune.load(shared, verify=False, train=False)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(logits(model), dense(model))
    assert torch.equal(logits(load_dense(library, shared)), dense(model))
    into = tokenprune.load(shared, load_dense(library, shared), verify=False, train=False)
    assert torch.equal(logits(into), logits(model))
    assert not {"bin", "pt", "pth", "pkl"} & {file.suffix[1:] for file in shared.iterdir()}


def test_a_folder_of_lv_vit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "num_classes": 5, "stem_width": 8}
    model = wrapped(timm.create_model("lvvit_t", **sizes))
    tokenprune.save(model, tmp_path)
    assert torch.equal(logits(tokenprune.load(tmp_path, verify=False, train=False)), logits(model))
    assert torch.equal(logits(load_dense("timm", tmp_path)), dense(model))


def test_certificate_and_card(library: str, model: Any, shared: Path) -> None:
    certificate = json.loads((shared / CERTIFICATE).read_text())
    assert certificate["num_keep"] == [8, 4]
    assert all(check["error"] <= check["bound"] for check in certificate["checks"])
    card = huggingface_hub.ModelCard.load(shared / CARD)
    assert card.data.to_dict() == {
        "library_name": "tokenprune",
        "license": "apache-2.0",
        "pipeline_tag": "image-classification",
        "tags": ["token-pruning", library],
    }
    ratio = tokenprune.profile(model).ratio
    assert f"**{100 * ratio:.1f} %**" in card.text
    assert "| patch tokens from block 1 on | 4 | 16 |" in card.text
    for picture in re.findall(r"!\[.*\]\((.+)\)", card.text):
        assert (shared / picture).stat().st_size > 1000
    assert "Without tokenprune" in card.text
    made: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(block, made)
    assert torch.equal(logits(made["model"]), logits(model))
    assert torch.equal(logits(made["host"].eval()), dense(model))


def test_budget_threshold_and_calibration_survive(tmp_path: Path) -> None:
    model = wrapped(vit())
    tokenprune.calibrate(model, [IMAGES], 0.85, fit_steps=4, progress=False)
    for change in (lambda: model.set_budget(0.8), lambda: model.set_threshold(0.4)):
        change()
        tokenprune.save(model.eval(), tmp_path)
        again = tokenprune.load(tmp_path, verify=False, train=False)
        assert pruning_of(again).budget == pruning_of(model).budget
        assert torch.equal(logits(again), logits(model))
        assert tokenprune.profile(again) == tokenprune.profile(model)


def test_a_model_without_predictors_of_its_own(tmp_path: Path) -> None:
    model = tokenprune.wrap(
        vit(drop_path_rate=0.1).bfloat16().eval(), "merge-k0.7", verify=False, train=False
    )
    model.save_pretrained(tmp_path, certify=False)
    assert not (tmp_path / ADDED).exists()
    again = tokenprune.load(tmp_path, verify=False, train=False)
    assert next(again.parameters()).dtype is torch.bfloat16
    assert again.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert torch.equal(logits(again, IMAGES.bfloat16()), logits(model, IMAGES.bfloat16()))
    assert "similar tokens are merged" in (tmp_path / CARD).read_text()


def test_what_a_later_save_does_not_write_is_removed(tmp_path: Path) -> None:
    model = wrapped(hf_vit())
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = tokenprune.load(tmp_path, verify=False, train=False)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_dense("transformers", tmp_path)), dense(model))
    (tmp_path / "notes.txt").write_text("mine")
    tokenprune.save(model, tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {WEIGHTS, ADDED, CONFIG, FACTS, "recipe.yaml", "notes.txt"}
    words = "meine Wörter".encode("latin-1")
    (tmp_path / CARD).write_bytes(words)
    model.save_pretrained(tmp_path, certify=False)
    assert (tmp_path / CARD).read_bytes() == words
    assert torch.equal(logits(load_dense("transformers", tmp_path)), dense(model))
    tokenprune.save(wrapped(undescribed()), tmp_path)
    assert not (tmp_path / CONFIG).exists()  # of a host that is not here any more
    with pytest.raises(CheckpointError, match=r"'v1' of .* is a folder here"):
        tokenprune.load(tmp_path, undescribed(), revision="v1")


def test_tied_predictors(tmp_path: Path) -> None:
    model = tokenprune.wrap(vit(depth=4).eval(), "learned-k0.7", verify=False, train=False)
    model.token_predictors[1] = model.token_predictors[0]
    tokenprune.save(model, tmp_path)
    again = tokenprune.load(tmp_path, verify=False, train=False)
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_hosts_that_no_library_builds(tmp_path: Path) -> None:
    replaced = vit()
    replaced.head = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 5))
    changed = vit()
    changed.blocks[1].mlp.act = nn.ReLU()
    scaled = vit()
    scaled.blocks[0].attn.scale = 0.5
    hosts = [(undescribed(), "no class of timm"), (replaced, "a layer was replaced")]
    hosts += [(changed, r"set otherwise \(blocks\.1\.mlp\.act\)"), (scaled, r"attn\.scale\)")]
    for host, why in hosts:
        model = wrapped(host)
        model.save_pretrained(tmp_path, certify=False)
        assert not (tmp_path / CONFIG).exists()
        assert "Without tokenprune" not in (tmp_path / CARD).read_text()
        with pytest.raises(CheckpointError, match=rf"{why}.*pass it: tokenprune\.load\('.*', host"):
            tokenprune.load(tmp_path)
        assert torch.equal(logits(tokenprune.load(tmp_path, host, verify=False)), logits(model))
    said = {"library": "timm", "model": "vit_tiny_patch16_224"}
    said |= {"kwargs": SMALL | {"num_classes": 5}}
    tokenprune.save(wrapped(undescribed()), tmp_path, host=said)
    assert torch.equal(
        logits(tokenprune.load(tmp_path, verify=False)), logits(wrapped(undescribed()))
    )


def test_a_class_outside_of_transformers_is_not_imported(shared: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(shared, tmp_path / "copied"))
    facts = json.loads((copied / FACTS).read_text())
    facts["host"] |= {"library": "transformers", "class": "tests.product.client_hosts.Evil"}
    (copied / FACTS).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"no model of transformers.*load\(folder, host\)"):
        tokenprune.load(copied)


def test_bad_calls(model: Any, library: str, shared: Path, tmp_path: Path) -> None:
    with pytest.raises(NotWrappedError, match=r"tokenprune\.wrap"):
        tokenprune.push_to_hub(vit(), "me/mine")
    if library == "timm":
        with pytest.raises(
            HostError, match=r"got max_shard_size.*model\.save_pretrained\(folder\)"
        ):
            model.save_pretrained(tmp_path, max_shard_size="1GB")
    with pytest.raises(CheckpointError, match=r"does not fit (.|\n)*load\(folder\)"):
        tokenprune.load(shared, vit(num_classes=9))


def test_nothing_is_written_without_proof_or_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(vit())

    def refuse(*_: Any, **__: Any) -> Any:
        raise VerificationError("no")

    monkeypatch.setattr("tokenprune.checkpoints.sharing.verify", refuse)
    with pytest.raises(VerificationError, match="no"):
        model.save_pretrained(tmp_path / "new")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"card=False leaves it out.*torch\[hub\]"):
        model.save_pretrained(tmp_path / "new", certify=False)
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", certify=False, card=False)
    assert not (tmp_path / "new" / CARD).exists()


class Digits(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        return {"pixel_values": IMAGES[number % 2], "labels": number % 5}


@pytest.mark.filterwarnings("ignore:no ratio term")
def test_a_trainers_folder(tmp_path: Path) -> None:
    """`transformers.Trainer` resumes from it with its predictors, and `load` reads it."""
    model = wrapped_anew(hf_vit()).train()
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, options, train_dataset=Digits())
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert not (folder / CARD).exists()
    again = tokenprune.load(folder, verify=False, train=False)
    assert torch.equal(logits(again), logits(model.eval()))
    assert torch.equal(
        logits(transformers.ViTForImageClassification.from_pretrained(folder)), dense(model)
    )
    other = wrapped_anew(hf_vit(seed=3), seed=5)
    resumed = transformers.Trainer(other, options, train_dataset=Digits())
    resumed._load_from_checkpoint(str(folder))
    assert torch.equal(logits(other), logits(model))


def test_a_trainers_folder_of_another_host(tmp_path: Path) -> None:
    """A Trainer writes only the state dict of a host that is not of transformers."""
    model = wrapped(vit())
    save_file(model.state_dict(), tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"load\('.*', host, recipe=\.\.\.\)"):
        tokenprune.load(tmp_path)
    again = tokenprune.load(tmp_path, vit(seed=2), recipe=RECIPE, verify=False, train=False)
    assert torch.equal(logits(again.eval()), logits(model))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*checkpoint-N"):
        tokenprune.load(tmp_path, vit(), recipe=RECIPE)


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    """DINOv3 is saved under other names than its module has."""
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    host = transformers.DINOv3ViTModel(config).eval()
    model = tokenprune.wrap(host, RECIPE, restore=True, verify=False, train=False)
    model.save_pretrained(tmp_path, certify=False, card=False)
    if [int(n) for n in transformers.__version__.split(".")[:2]] >= [5, 23]:  # 5.0 keeps them
        assert load_file(tmp_path / WEIGHTS).keys() != host.state_dict().keys()
    for again in (
        tokenprune.load(tmp_path, verify=False, train=False),
        tokenprune.load(tmp_path, transformers.DINOv3ViTModel(config), verify=False, train=False),
    ):
        found = again.eval()(IMAGES).last_hidden_state
        assert torch.equal(found, model(IMAGES).last_hidden_state)
