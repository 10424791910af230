"""`fit`: what a run minimises, moves, logs, evaluates and refuses."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

import tokenprune
from tokenprune.errors import CheckpointError, NotWrappedError, PlanError, RecipeError
from tokenprune.losses import PruningLoss
from tokenprune.runtime.model import PrunedModel
from tokenprune.train import DataBundle, DataError, PruningTrainer, evaluate, fit, pretrain
from tokenprune.train.arguments import training_arguments
from tokenprune.train.image_trainer import ImageTrainer

CLASSES = 3
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "warmup_epochs": 0}


def recipe(loss: dict[str, Any] | None = None, **train: Any) -> tokenprune.Recipe:
    return tokenprune.Recipe.parse(
        {
            "version": 1,
            "schedule": {"blocks": [1, 2], "keep_ratio": 0.6},
            "loss": loss or {},
            "train": {**TRAIN, "frozen_epochs": 0, **train},
        }
    )


def bundle(train: int = 16, classes: int = CLASSES) -> DataBundle:
    """Images whose class is their colour."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Any:
        labels = [index % classes for index in range(count)]
        drawn = torch.randn(count, 3, 16, 16, generator=generator)
        for image, label in zip(drawn, labels, strict=True):
            image[label % 3] += 2
        return [{"pixel_values": i, "labels": n} for i, n in zip(drawn, labels, strict=True)]

    return DataBundle(
        train=images(train),
        eval=images(9),
        class_names=tuple(map(str, range(classes))),
        image_size=16,
    )


def timm_host(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    host = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **{**small, **options})
    for parameter in host.parameters():
        if parameter.ndim > 1:  # strong enough to be trained in a few steps
            nn.init.normal_(parameter, std=0.2)
    return host


def hf_host() -> nn.Module:
    """One with a parameter that gets no gradient: a mask token."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_labels=CLASSES,
    )
    return transformers.Dinov2ForImageClassification(config)


def wrapped(host: nn.Module, chosen: tokenprune.Recipe) -> Any:
    return tokenprune.wrap(host, chosen, verify=False, train=False)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("make", [timm_host, hf_host])
def test_a_run_trains_logs_and_evaluates_hosts_of_both_libraries(
    make: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    chosen = recipe()
    host = make()
    model = wrapped(host, chosen).eval()
    config = copy.deepcopy(vars(getattr(model, "config", nn.Module())))
    seen: list[tuple[int, int, bool]] = []
    result = fit(
        chosen,
        model,
        bundle(),
        tmp_path,
        progress=lambda step, total, logs: seen.append((step, total, "loss" in logs)),
    )
    assert seen == [(1, 4, False), (2, 4, False), (3, 4, True), (4, 4, True)]
    assert {"accuracy", "loss", "steps", "epochs", "seconds"} == result.metrics.keys()
    assert result.metrics["steps"] == 4
    assert evaluate(model, bundle()) == result.metrics["accuracy"]

    parts = {"classification", "ratio", "distill_logits", "distill_tokens"}
    logs = [entry for entry in result.history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    for entry in logs:
        assert parts | {"kept_share_0", "kept_share_1"} <= entry.keys()
        weighted = sum(getattr(chosen.loss, part) * entry[part] for part in parts)
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
        assert 0 < entry["kept_share_1"] <= entry["kept_share_0"] < 1
    assert [entry["step"] for entry in result.history if "eval_accuracy" in entry] == [2, 4]

    assert not any(module.training for module in model.modules())
    assert tokenprune.unwrap(model) is host
    assert vars(getattr(model, "config", nn.Module())).keys() == config.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not recwarn.list


@pytest.mark.parametrize("parts", [{"mode": "merge"}, {"mode": "fuse"}, {"scorer": "random"}])
def test_methods_without_predictors_train_on_the_path_of_eval(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    mapping = recipe(mixup=0.2).model_dump(mode="json", exclude_none=True)
    for key in ("mode", "scorer", "place"):
        del mapping[key]
    chosen = tokenprune.Recipe.parse({**mapping, **parts})
    model = wrapped(timm_host(), chosen)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fit(chosen, model, bundle(), tmp_path / "run")
    assert 0 <= result.metrics["accuracy"] <= 1
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    saved = tokenprune.load(tokenprune.save(model, tmp_path / "saved"), timm_host(), verify=False)
    x = torch.stack([image["pixel_values"] for image in bundle().eval])  # type: ignore[attr-defined]
    if "random" not in str(parts):
        with torch.no_grad():
            assert torch.equal(saved.eval()(x), model.eval()(x))


def test_loss_is_that_of_the_recipe_against_the_dense_host(tmp_path: Path) -> None:
    chosen = recipe({"ratio": 3.0, "distill_logits": 0.7, "distill_tokens": 0.2})
    model = wrapped(timm_host(), chosen).train()
    trainer = PruningTrainer(model, arguments(chosen, tmp_path), bundle())
    before = copy.deepcopy(model).eval()
    with torch.no_grad():  # the student has moved on, the teacher has not
        model.head.weight.mul_(2)
        model.blocks[2].mlp.fc1.weight.add_(0.1)
    batch = torch.utils.data.default_collate(bundle().train[:8])  # type: ignore[index]
    noise = trainer.noise.get_state()
    found = trainer.compute_loss(model, batch)

    generator = torch.Generator()
    generator.set_state(noise)
    with model.using(path="mask", generator=generator):
        logits, trace = model(batch["pixel_values"], return_trace=True)
    with before.using(path="dense"):
        teacher_logits, dense = before(batch["pixel_values"], return_trace=True)
    loss = PruningLoss(keep_ratios=(0.6, 0.36), **chosen.loss.model_dump())
    expected, parts = loss(
        logits,
        batch["labels"],
        [stage.decision for stage in trace.stages],
        teacher_logits=teacher_logits,
        student_tokens=trace.patch_tokens,
        teacher_tokens=dense.patch_tokens,
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert min(parts["distill_logits"], parts["distill_tokens"]) > 1e-3


def test_teacher_stands_still_and_another_one_is_listened_to(tmp_path: Path) -> None:
    chosen = recipe({"distill_logits": 50.0}, epochs=3, backbone_lr_scale=1.0)
    biased = timm_host()
    with torch.no_grad():
        biased.head.bias.add_(9 * torch.eye(CLASSES)[0])
    leans = []
    for teacher in (None, biased, wrapped(copy.deepcopy(biased), chosen)):
        model = wrapped(timm_host(), chosen)
        trainer = PruningTrainer(model, arguments(chosen, tmp_path), bundle(), teacher=teacher)
        start = weights(trainer.teacher)  # type: ignore[arg-type]
        trainer.train()
        assert not changed(trainer.teacher, start)  # type: ignore[arg-type]
        leans.append((model.head.bias[0] - model.head.bias[1]).item())
    assert leans[1] > leans[0] + 0.05
    assert leans[2] == leans[1]


def test_frozen_epochs_and_frozen_parameters(tmp_path: Path) -> None:
    chosen = recipe(epochs=4, frozen_epochs=1, frozen_parameters=["cls_token", "pos_embed"])
    model = wrapped(timm_host(), chosen)
    before = weights(model)
    moved: dict[int, set[str]] = {}

    def look(step: int, *_: Any) -> None:
        moved[step] = changed(model, before)

    fit(None, model, bundle(), tmp_path, progress=look)
    assert moved[2]
    assert all(name.startswith("token_predictors.") for name in moved[2])
    assert before.keys() - moved[8] == {"cls_token", "pos_embed"}


def test_training_learns_the_classes_and_the_kept_share(tmp_path: Path) -> None:
    chosen = recipe({"ratio": 20.0}, epochs=20, backbone_lr_scale=1.0)
    model = wrapped(timm_host(), chosen)
    result = fit(None, model, bundle(24), tmp_path, progress=False, save_every="never")
    first, *_, last = (entry for entry in result.history if "loss" in entry)
    assert result.metrics["accuracy"] == 1
    assert last["ratio"] < 0.5 * first["ratio"]
    assert last["kept_share_0"] == pytest.approx(0.6, abs=0.1)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    chosen = recipe(epochs=1, backbone_lr_scale=1.0, learning_rate=1e-3)
    finals = []
    for steps in (1, 4):
        host = timm_host()
        given = training_arguments(
            chosen.train, tmp_path, num_images=16, accumulation_steps=steps, save_every="never"
        )
        ImageTrainer(host, given, bundle(), chosen.train).train()
        finals.append(weights(host))
    moved = changed(timm_host(), finals[0])
    assert len(moved) == len(finals[0])
    for name, tensor in finals[0].items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
            torch.testing.assert_close(finals[1][name], tensor, atol=2e-5, rtol=1e-4)


def test_evaluation_takes_the_path_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe()
    model = wrapped(timm_host(), chosen).train()
    paths: list[Any] = []
    using = PrunedModel.using

    def spy(self: Any, path: Any) -> Any:
        paths.append(path)
        return using(self, path=path)

    monkeypatch.setattr(PrunedModel, "using", spy)
    data = bundle()
    scores = {evaluate(model, data, batch_size=size) for size in (1, 4, 100)}
    assert len(scores) == 1
    assert evaluate(model, data, "mask") in scores
    assert paths == ["gather"] * 3 + ["mask"]
    assert model.training
    assert evaluate(model, data, "dense") == evaluate(tokenprune.unwrap(model), data, "dense")
    with pytest.raises(NotWrappedError, match=r"VisionTransformer is not wrapped.*'gather' path"):
        evaluate(timm_host(), data)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_mixed_precision_leaves_the_model_as_it_was(
    tmp_path: Path, ema_decay: float | None
) -> None:
    chosen = recipe(epochs=1, mixed_precision="bf16", ema_decay=ema_decay)
    model = wrapped(timm_host(), chosen)
    fit(None, model, bundle(), tmp_path, progress=False)
    assert "forward" not in vars(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.eval()(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_a_finished_run_is_not_run_again_and_a_fresh_one_is(tmp_path: Path) -> None:
    chosen = recipe(epochs=1, ema_decay=0.9)
    model = wrapped(timm_host(), chosen)
    first = fit(None, model, bundle(), tmp_path, progress=False)
    again = wrapped(timm_host(), chosen)
    steps: list[int] = []

    def count(step: int, *_: Any) -> None:
        steps.append(step)

    second = fit(None, again, bundle(), tmp_path, progress=count)
    assert not steps
    assert not changed(again, weights(model))
    assert second.metrics["accuracy"] == first.metrics["accuracy"]
    fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path, progress=count, resume=False)
    assert steps == [1, 2]


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    chosen = recipe()
    fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path, progress=False, epochs=1)
    model = wrapped(timm_host(), chosen)
    before = weights(model)
    with pytest.raises(
        CheckpointError,
        match=r"another run.*\n  - images: 16 there, 18 now\n  - recipe\.train\.epochs: 1 there, 2",
    ):
        fit(None, model, bundle(18), tmp_path, progress=False)
    assert not changed(model, before)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json does not say of which run"):
        fit(None, model, bundle(), tmp_path, progress=False)


def test_dense_head_is_compared_by_its_logits(tmp_path: Path) -> None:
    from tokenprune.models import LVViT

    chosen = recipe({"token_distance": "kl"}, epochs=1)
    torch.manual_seed(0)
    host = LVViT(
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        stem_width=8,
        num_classes=CLASSES,
    )
    result = fit(None, wrapped(host, chosen), bundle(), tmp_path / "a", progress=False)
    assert result.history[0]["distill_tokens"] > 0
    with pytest.raises(PlanError, match=r"VisionTransformer has no dense head"):
        fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path / "b", progress=False)


def test_pretraining_trains_a_dense_host(tmp_path: Path) -> None:
    host = timm_host()
    before = weights(host)
    result = pretrain(host, bundle(24), 12, batch_size=8, learning_rate=0.01, progress=False)
    assert result.metrics["accuracy"] == evaluate(host, bundle(24), "dense") == 1
    assert changed(host, before) == before.keys()
    assert not hasattr(host, "token_predictors")


def test_pretraining_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    class CutOffError(Exception):
        pass

    def cut_off(step: int, total: int, logs: dict[str, float]) -> None:
        if step == 5:
            raise CutOffError

    def run(folder: str, progress: Any = False, epochs: int = 3) -> tuple[nn.Module, list[float]]:
        host = timm_host()
        result = pretrain(
            host,
            bundle(24),
            epochs,
            batch_size=8,
            mixup=0.5,
            output_dir=tmp_path / folder,
            progress=progress,
        )
        return host, [entry["loss"] for entry in result.history if "loss" in entry]

    whole, losses = run("whole")
    with pytest.raises(CutOffError):
        run("cut", cut_off)
    for seen in ([4, 5, 6, 7, 8, 9], []):  # the rest; then nothing is left to train
        steps: list[int] = []
        host, again = run("cut", lambda step, total, logs, to=steps: to.append(step))
        assert steps == seen
        assert again == losses
        assert not changed(host, weights(whole))
    with pytest.raises(CheckpointError, match=r"train.epochs: 3 there, 4 now"):
        run("cut", epochs=4)


def arguments(chosen: tokenprune.Recipe, folder: Path) -> Any:
    return training_arguments(chosen.train, folder, num_images=16, save_every="never")


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    chosen = recipe()
    model = wrapped(timm_host(), chosen)
    before = weights(model)
    with pytest.raises(PlanError, match=r"data has 5 classes, .* head has 3"):
        fit(None, model, bundle(classes=5), tmp_path, progress=False)
    other = {"version": 1, "schedule": {"blocks": [1], "keep_ratio": 0.6}}
    with pytest.raises(PlanError, match=r"prunes before blocks \[1\], .* before\s+\[1, 2\]"):
        fit(other, model, bundle(), tmp_path, progress=False)
    with pytest.raises(NotWrappedError, match=r"Call\s+tokenprune\.wrap"):
        fit(chosen, timm_host(), bundle(), tmp_path, progress=False)
    with pytest.raises(RecipeError, match=r"with your changes:\n  - train\.epochs: .* 1, found 0"):
        fit(None, model, bundle(), tmp_path, progress=False, epochs=0)
    with pytest.raises(PlanError, match=r"batch of 8 images .* multiple of 3"):
        fit(None, model, bundle(), tmp_path, progress=False, accumulation_steps=3)
    assert not changed(model, before)


def test_a_recipe_of_other_ratios_is_not_what_would_be_trained(tmp_path: Path) -> None:
    model = wrapped(timm_host(), recipe())
    other = recipe().model_dump(mode="json", exclude_none=True)
    other["schedule"]["keep_ratio"] = 0.5
    with pytest.raises(PlanError, match=r"keeps \[0\.5, 0\.25\], the model \[0\.6, 0\.36\]"):
        fit(other, model, bundle(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works there")
def test_fp16_needs_an_accelerator(tmp_path: Path) -> None:
    chosen = recipe(mixed_precision="fp16")
    with pytest.raises(PlanError, match="'fp16', which needs an accelerator"):
        fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path, progress=False)


def test_checkpoints_of_another_program_are_not_deleted(tmp_path: Path) -> None:
    """A dense host that was trained by plain transformers, say."""
    theirs = tmp_path / "checkpoint-500" / "model.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("weights")
    chosen = recipe(epochs=1)
    with pytest.raises(CheckpointError, match="holds checkpoint-500, which another program wrote"):
        fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path)
    assert theirs.read_text() == "weights"
    fit(None, wrapped(timm_host(), chosen), bundle(), tmp_path, resume=False)
    assert not theirs.exists()


def test_other_images_are_another_run(tmp_path: Path) -> None:
    """As many images in as many classes: MNIST and Fashion-MNIST, say."""
    chosen, data = recipe(epochs=1), bundle()
    fit(None, wrapped(timm_host(), chosen), data, tmp_path)
    for other, says in (
        ({"class_names": ("cat", "dog", "fox")}, "classes: "),
        ({"mean": (0.4, 0.5, 0.5)}, "mean: "),
        ({"train": Labelled(data.train)}, "labels: "),
    ):
        with pytest.raises(CheckpointError, match=says):
            fit(None, wrapped(timm_host(), chosen), replace(data, **other), tmp_path)


class Labelled(list[Any]):
    """A data set that tells its labels apart from its images."""

    labels = (2, 1, 0)


def test_data_without_images_to_evaluate_on_is_refused_at_once(tmp_path: Path) -> None:
    chosen = recipe(epochs=1)
    with pytest.raises(DataError, match="has no image to evaluate on"):
        fit(None, wrapped(timm_host(), chosen), replace(bundle(), eval=[]), tmp_path)
    assert not list(tmp_path.iterdir())
