"""`save` and `load`: the same outputs again, or an error that says why and changes nothing."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenprune
from tokenprune.checkpoints.directory import load, save
from tokenprune.checkpoints.facts import ADDED, CONFIG, FACTS, RECIPE, WEIGHTS
from tokenprune.errors import (
    AlreadyWrappedError,
    CheckpointError,
    NonFiniteWeightsError,
    NotWrappedError,
    VerificationError,
)
from tokenprune.hosts.spec import ExampleInput
from tokenprune.runtime.model import pruning_of

STAGES: dict[str, Any] = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
SMALL["num_classes"] = 5


def vit(seed: int = 0, **options: Any) -> nn.Module:
    """A small host; another seed is another set of weights."""
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()


def hf_vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config).eval()


def swin(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    small = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "window_size": 4, "depths": (2, 2)}
    return timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=5, num_heads=(2, 4), **small
    ).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.fixture(scope="module")
def model() -> Any:
    """A wrapped host; no test changes it."""
    return tokenprune.wrap(vit(), STAGES, verify=False, train=False)


@pytest.fixture(scope="module")
def template(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("template"))


@pytest.fixture
def saved(template: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(template, tmp_path / "saved"))


@pytest.mark.parametrize(
    ("make", "recipe"),
    [(vit, STAGES), (hf_vit, STAGES), (swin, {**STAGES, "mode": "bypass"} | {
        "schedule": {"blocks": [0, 1], "keep_ratio": 0.6}})],
    ids=["timm", "transformers", "swin"],
)  # fmt: skip
def test_a_loaded_model_is_the_saved_one(make: Any, recipe: Any, tmp_path: Path) -> None:
    model = tokenprune.wrap(make(seed=0), recipe).eval()
    host = make(seed=1)
    again = load(save(model, tmp_path / "deep" / "er"), host)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(logits(again(images)), logits(model(images)))
    assert same(again.state_dict(), model.state_dict())
    assert tokenprune.unwrap(again) is host
    assert type(again) is type(model)


def test_five_files_and_no_pickle(saved: Path) -> None:
    files = [WEIGHTS, ADDED, RECIPE, FACTS, CONFIG]
    assert sorted(f.name for f in saved.iterdir()) == sorted(files)
    facts = json.loads((saved / FACTS).read_text())
    assert facts["versions"].keys() >= {"tokenprune", "torch", "timm"}
    assert facts["host"]["class"] == "timm.models.vision_transformer.VisionTransformer"
    for file in saved.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, KeyError, IndexError, EOFError)):
            pickle.loads(file.read_bytes())
    assert list(saved.parent.iterdir()) == [saved]


def test_keep_ratios_in_force_are_saved(tmp_path: Path) -> None:
    model = tokenprune.wrap(vit(), STAGES, verify=False, train=False)
    model.set_keep_ratio([0.5, 0.25])
    again = load(save(model, tmp_path), vit(seed=1), verify=False)
    assert pruning_of(again).budget.keep_ratios == (0.5, 0.25)
    assert tokenprune.Recipe.load(tmp_path / RECIPE).resolved_stages[1].keep_ratio == 0.25


def test_options_of_wrap_are_kept(tmp_path: Path) -> None:
    model = tokenprune.wrap(
        vit(), STAGES, adapter="generic", restore=True, verify=False, train=False
    )
    again = pruning_of(load(save(model, tmp_path), vit(seed=1), verify=False))
    assert (again.spec.adapter, again.restore) == ("generic", True)


def test_an_unknown_adapter_is_replaced_by_the_one_that_matches(tmp_path: Path) -> None:
    save(tokenprune.wrap(vit(), STAGES, verify=False, train=False), tmp_path)
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["wrap"]["adapter"] = "of another release"
    (tmp_path / FACTS).write_text(json.dumps(facts))
    again = pruning_of(load(tmp_path, vit(seed=1), verify=False))
    assert again.spec.adapter == "timm/vision_transformer"


def test_what_was_stated_about_a_host_is_stated_again(tmp_path: Path) -> None:
    given = {"x": ExampleInput(shape=(3, 32, 32))}
    spec = tokenprune.ArchSpec(adapter="by hand", num_prefix_tokens=2, inputs=given)
    model = tokenprune.wrap(vit(reg_tokens=2), STAGES, adapter=spec, verify=False, train=False)
    save(model, tmp_path)
    host = vit(seed=1, reg_tokens=2)
    before = weights(host)
    with pytest.raises(CheckpointError, match=r"num_prefix_tokens=2, but .*num_prefix_tokens=3"):
        load(tmp_path, host, adapter="timm/vision_transformer", verify=False)
    assert same(before, weights(host))
    again = load(tmp_path, verify=False)
    assert pruning_of(again).adapter == spec
    assert pruning_of(again).spec.blocks == pruning_of(model).spec.blocks
    assert same(again.state_dict(), model.state_dict())
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["host"]["spec"]["blocks"] = 3
    (tmp_path / FACTS).write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"no ArchSpec holds.*adapter=ArchSpec"):
        load(tmp_path, host, verify=False)


def test_shared_parameters_are_stored_once(tmp_path: Path) -> None:
    def tied(seed: int) -> Any:
        host: Any = vit(seed)
        host.blocks[2].mlp.fc1.weight = host.blocks[0].mlp.fc1.weight
        return host

    model = tokenprune.wrap(tied(0), STAGES, verify=False, train=False)
    save(model, tmp_path)
    aliases = json.loads((tmp_path / FACTS).read_text())["aliases"]
    assert aliases == {"blocks.2.mlp.fc1.weight": "blocks.0.mlp.fc1.weight"}
    host = tied(1)
    again = load(tmp_path, host, verify=False)
    assert host.blocks[2].mlp.fc1.weight is host.blocks[0].mlp.fc1.weight
    assert same(again.state_dict(), model.state_dict())
    untied = load(tmp_path, vit(2), verify=False)  # the values go to both places
    assert same(untied.state_dict(), model.state_dict())


def test_views_into_a_larger_tensor_are_stored_alone(tmp_path: Path) -> None:
    host = vit()
    both = torch.randn(2, 16)
    host.norm.weight.data, host.norm.bias.data = both[0], both[1]  # type: ignore[union-attr]
    model = tokenprune.wrap(host, STAGES, verify=False, train=False)
    again = load(save(model, tmp_path), vit(seed=1), verify=False)
    assert same(again.state_dict(), model.state_dict())


def test_saving_again_replaces_and_leaves_other_files(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    model = tokenprune.wrap(vit(seed=3), STAGES, verify=False, train=False)
    save(model, saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert same(load(saved, vit(), verify=False).state_dict(), model.state_dict())


def test_the_hosts_own_checkpoint_still_loads(saved: Path) -> None:
    model = load(saved, vit(seed=1))
    other = vit(seed=2)
    model.load_state_dict(other.state_dict())
    assert same(tokenprune.unwrap(model).state_dict(), other.state_dict())


@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
@pytest.mark.parametrize(
    "moment", ["checkpoints.directory.save_file", "checkpoints.directory.sha256", "files._flush"]
)
def test_a_crash_leaves_no_half_directory(
    moment: str, there: bool, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    if there:
        save(model, target)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"tokenprune.{moment}", crash)
        with pytest.raises(KeyboardInterrupt):
            save(model, target)
    assert list(tmp_path.iterdir()) == ([target] if there else [])
    if there:
        assert same(load(target, vit(seed=2), verify=False).state_dict(), model.state_dict())


def test_a_crash_between_the_moves_is_seen(saved: Path, tmp_path: Path) -> None:
    newer = save(
        tokenprune.wrap(vit(seed=1), STAGES, verify=False, train=False), tmp_path / "newer"
    )
    (newer / WEIGHTS).replace(saved / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"checksum is not the one.*cut off"):
        load(saved, vit())


def test_saving_what_is_not_wrapped(tmp_path: Path) -> None:
    with pytest.raises(NotWrappedError, match=r"tokenprune\.wrap"):
        save(vit(), tmp_path)


def test_saving_to_a_file(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"):
        save(model, tmp_path / "file")


def test_a_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Counting(nn.LayerNorm):
        def get_extra_state(self) -> Any:
            return {"calls": 0}

    model = tokenprune.wrap(vit(), STAGES, verify=False, train=False)
    model.norm = Counting(16)
    with pytest.raises(CheckpointError, match=r"norm\._extra_state.*it is dict"):
        save(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def spoil(saved: Path, name: str) -> str:
    """Damage a checkpoint in one way; returns what the error must say."""
    file = saved / WEIGHTS
    data = file.read_bytes()
    facts = json.loads((saved / FACTS).read_text())
    if name == "truncated":
        file.write_bytes(data[: len(data) // 2])
        return r"model.safetensors in .* is damaged: it cannot be read"
    if name == "empty":
        file.write_bytes(b"")
        return "damaged: it cannot be read"
    if name == "a flipped bit":
        file.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
        return "its checksum is not the one"
    if name == "a pickle":
        torch.save({"x": torch.zeros(1)}, file)
        return "damaged: it cannot be read"
    if name == "no weights":
        file.unlink()
        return r"is no checkpoint: it lacks model.safetensors"
    if name == "no predictors":
        (saved / ADDED).unlink()
        return r"lacks predictors\.safetensors.*wrap\(host, recipe\)"
    if name == "other weights":
        save_file(vit(seed=7).state_dict(), file)
        return r"checksum is not the one.*or the weights of another model"
    if name == "no facts":
        (saved / FACTS).unlink()
        return "it lacks tokenprune.json"
    if name == "facts cut off":
        (saved / FACTS).write_text(json.dumps(facts)[:40])
        return r"tokenprune.json in .* is damaged"
    if name == "facts of another kind":
        (saved / FACTS).write_text("[1, 2]")
        return r"tokenprune.json in .* is damaged"
    if name == "facts without a key":
        (saved / FACTS).write_text(json.dumps({**facts, "files": None}))
        return r"tokenprune.json in .* is damaged(.|\n)*files"
    if name == "newer":
        newer = {"format": 3, "versions": {"tokenprune": "9.1"}, "unheard": "of"}
        (saved / FACTS).write_text(json.dumps(newer))
        return r"format 3 \(written by tokenprune 9.1\).*reads up to 2. Run: pip install --upgrade"
    (saved / RECIPE).write_text("version: 1\nstagse: []\n")
    return r"recipe.yaml in .* is damaged(.|\n)*stagse"


@pytest.mark.parametrize(
    "name",
    [
        *("truncated", "empty", "a flipped bit", "a pickle", "no weights", "no facts"),
        *("no predictors", "other weights"),
        *("facts cut off", "facts of another kind", "facts without a key", "newer", "recipe"),
    ],
)
def test_a_damaged_checkpoint(name: str, saved: Path) -> None:
    message = spoil(saved, name)
    host = vit(seed=1)
    before = weights(host)
    with pytest.raises(CheckpointError, match=message):
        load(saved, host)
    assert same(before, weights(host))


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none' is no checkpoint: it is no directory"):
        load(tmp_path / "none", vit())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 4}, r"missing in the checkpoint \(12\): blocks\.3\.attn.* and 4 more"),
        ({"depth": 2}, r"unexpected \(12\): blocks\.2\.attn"),
        ({"embed_dim": 32}, r"of another shape .*blocks\.0\.attn\.proj\.bias \[16\], not \[32\]"),
        ({"num_classes": 9}, r"of another shape \(2\): head\.bias \[5\], not \[9\]"),
    ],
)
def test_a_wrong_host(options: dict[str, Any], message: str, saved: Path) -> None:
    host = vit(seed=1, **options)
    before = weights(host)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(saved, host)
    assert "timm.models.vision_transformer.VisionTransformer" in str(caught.value)
    assert "Build the host as the saved one was built" in str(caught.value)
    assert same(before, weights(host))


def test_a_recipe_with_other_stages(saved: Path) -> None:
    (saved / RECIPE).write_text("version: 1\nstages: [{block: 1, keep_ratio: 0.6}]\n")
    host = vit(seed=1)
    before = weights(host)
    with pytest.raises(CheckpointError, match=r"what its recipe adds.*\n.*unexpected \(\d+\): tok"):
        load(saved, host)
    assert same(before, weights(host))


def test_a_wrapped_host(saved: Path, model: Any) -> None:
    with pytest.raises(AlreadyWrappedError, match="unwrap"):
        load(saved, model)


def test_a_host_without_memory(saved: Path) -> None:
    with torch.device("meta"):
        host = vit()
    with pytest.raises(CheckpointError, match="to_empty"):
        load(saved, host)


def test_nan_in_the_saved_weights(tmp_path: Path) -> None:
    model = tokenprune.wrap(vit(), STAGES, verify=False, train=False)
    model.norm.weight.data[3] = float("nan")
    save(model, tmp_path)
    host = vit(seed=1)
    before = weights(host)
    with pytest.raises(NonFiniteWeightsError, match=r"norm\.weight"):
        load(tmp_path, host, verify=False)
    assert same(before, weights(host))


def test_a_failed_proof_gives_the_weights_back(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise VerificationError("no")

    host = vit(seed=1)
    before = weights(host)
    monkeypatch.setattr(sys.modules["tokenprune.wrapping"], "verify_wrapped", refuse)
    with pytest.raises(VerificationError, match="no"):
        load(saved, host)
    assert same(before, weights(host))
    load(saved, host, verify=False)
    assert not same(before, weights(host))
