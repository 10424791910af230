"""`calibrate` and `compare`: a budget spent where it costs least, and what methods lose."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import tokenprune
from tests.toys.vit import randomize_weights
from tokenprune import methods
from tokenprune.errors import HostError, NotWrappedError, PlanError
from tokenprune.hosts.batches import Batches
from tokenprune.runtime.model import pruning_of
from tokenprune.tune.divergence import distances
from tokenprune.tune.trials import Reference


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    host = timm.models.vision_transformer.VisionTransformer(
        **{**given, "num_classes": 5, **options}
    )
    randomize_weights(host, 2.0)
    return host.eval()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def wrapped(name: str = "merge-k0.7", **options: Any) -> Any:
    return tokenprune.wrap(vit(**options), name, verify=False, train=False).eval()


def interrupt(done: int, total: int, text: str) -> None:
    raise KeyboardInterrupt


FORMS = {
    "tensor": lambda x: x,
    "list": lambda x: [x[:4], x[4:]],
    "tuples": lambda x: [(x[:4], torch.zeros(4, dtype=torch.long), "name"), [x[4:]]],
    "mappings": lambda x: [{"x": x[:4], "labels": torch.zeros(4)}, {"x": x[4:], "other": 1}],
    "data set": lambda x: torch.utils.data.TensorDataset(x, torch.zeros(8)),
    "iterator": lambda x: iter([x[:4], x[4:]]),
    "loader": lambda x: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(8)), batch_size=4
    ),
}


def test_a_loader_that_shuffles_is_read_once() -> None:
    data = torch.utils.data.TensorDataset(images())
    batches = Batches(vit(), torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
    one, other = ([batch.args[0] for batch in batches] for _ in range(2))
    assert torch.equal(torch.cat(one), torch.cat(other))


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_are_read_again_and_again(form: str) -> None:
    batches = Batches(vit(), FORMS[form](images()))
    for _ in range(2):
        read = [next(iter((*batch.args, *batch.kwargs.values()))) for batch in batches]
        assert torch.equal(torch.cat(read), images())


def test_what_is_no_batch_is_said() -> None:
    for source, message in (
        ([], "No images were given"),
        (["a.png"], "a tuple that begins with one, found str"),
        (
            [{"pixels": images()}],
            r"none of the arguments that the host takes \(x, attn",
        ),
    ):
        with pytest.raises(HostError, match=message):
            list(Batches(vit(), source))
    with pytest.raises(HostError, match="one whole number an image"):
        list(Batches(vit(), images(), labels=[0, 1, 2]))
    with pytest.raises(HostError, match="There are 9 labels for 8 images"):
        list(Batches(vit(), images(), labels=range(9)))


def test_distances() -> None:
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 4.0]])
    assert float(distances("cosine", one, other)) == pytest.approx(0, abs=1e-6)
    p, q = one.softmax(1), other.softmax(1)
    assert float(distances("kl", one, other)) == pytest.approx(float((p * (p / q).log()).sum()))


def test_merging_is_calibrated_in_place(tmp_path: Path) -> None:
    model = wrapped()
    host, weights = pruning_of(model).host, {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model(images())
    tokenprune.freeze_guards(model)
    seen: list[tuple[int, int, str]] = []
    report = tokenprune.calibrate(
        model, images(), 0.6, trials=10, progress=lambda *given: seen.append(given)
    )
    assert [done for done, *_ in seen] == list(range(1, 11))
    assert len(report.tried) == 10
    assert all(abs(schedule.macs - 0.6) < 0.02 for schedule in report.tried)
    trial, share = report.after
    assert abs(share - 0.6) < 0.02
    assert share == pytest.approx(tokenprune.profile(model).ratio)
    least = min(schedule.trial.divergence for schedule in report.tried)
    assert trial.divergence == pytest.approx(least, rel=1e-3)
    assert report.recipe == pruning_of(model).recipe
    assert pruning_of(model).host is host
    assert tokenprune.cache_info(model).frozen
    tokenprune.freeze_guards(model, False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    tokenprune.verify(model)
    loaded = tokenprune.load(tokenprune.save(model, tmp_path / "m"), vit(), verify=False).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
    assert report.plot(tmp_path / "costs.png").stat().st_size > 1000
    text = str(report)
    assert "merge, similarity, calibrated on 8 images" in text
    assert "every block, falling" in text


def test_it_is_deterministic_and_resumes(tmp_path: Path) -> None:
    whole = tokenprune.calibrate(wrapped(), images(), 0.6, trials=9)
    file, model = tmp_path / "trials.json", wrapped()
    before = pruning_of(model).recipe

    def stop(done: int, total: int, text: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenprune.calibrate(model, images(), 0.6, trials=9, resume=file, progress=stop)
    assert pruning_of(model).recipe is before
    ran: list[Any] = []
    real = Reference.trial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "trial", lambda *given: ran.append(1) or real(*given))
        again = tokenprune.calibrate(model, images(), 0.6, trials=9, resume=file)
    assert len(ran) <= 9 - 5 + 2  # before and after are seen each time
    assert again.recipe == whole.recipe
    assert again.tried == whole.tried


def test_a_file_of_another_calibration_is_refused(tmp_path: Path) -> None:
    for name, file, steps in (
        ("merge-k0.7", "a", {"trials": 2}),
        ("dynamicvit-k0.7", "b", {"fit_steps": 12}),
    ):
        given: dict[str, Any] = {**steps, "resume": tmp_path / file}
        tokenprune.calibrate(wrapped(name), images(), 0.7, **given)
        tokenprune.calibrate(wrapped(name), images(), 0.7, **given)
        model = wrapped(name)
        before = dict(vars(pruning_of(model)))
        for other, macs in ((images(4), 0.7), (images(), 0.6)):
            with pytest.raises(PlanError, match="holds another calibration: of other images"):
                tokenprune.calibrate(model, other, macs, **given)
        assert vars(pruning_of(model)) == before


@pytest.mark.parametrize("name", ["merge-k0.7", "dynamicvit-k0.7"])
def test_nothing_is_half_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the very last look at the model."""
    model, last = wrapped(name), 3 if name == "dynamicvit-k0.7" else 4
    before, weights = (
        dict(vars(pruning_of(model))),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    real, calls = Reference.trial, list[int]()

    def trial(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(Reference, "trial", trial)
    with pytest.raises(KeyboardInterrupt):
        tokenprune.calibrate(model, images(), 0.7, trials=2, fit_steps=2)
    assert vars(pruning_of(model)) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_predictors_alone_are_fitted(tmp_path: Path) -> None:
    def fitted(**given: Any) -> tuple[Any, Any]:
        model = wrapped("dynamicvit-k0.7")
        report = tokenprune.calibrate(model, images(), 0.7, fit_steps=24, **given)
        return model, report

    model, report = fitted()
    host = vit().state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in host.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert report.after[0].divergence < report.before[0].divergence
    assert abs(report.after[1] - 0.7) < 0.02
    other, _ = fitted()
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])

    def stop(done: int, total: int, text: str) -> None:
        if done == 14:
            raise KeyboardInterrupt

    file, broken = tmp_path / "fit.pt", wrapped("dynamicvit-k0.7")
    start = {k: v.clone() for k, v in broken.state_dict().items()}
    budget = pruning_of(broken).budget
    given = {"fit_steps": 24, "resume": file}
    with pytest.raises(KeyboardInterrupt):
        tokenprune.calibrate(broken, images(), 0.7, progress=stop, **given)
    assert all(torch.equal(value, broken.state_dict()[key]) for key, value in start.items())
    assert pruning_of(broken).budget is budget
    tokenprune.calibrate(broken, images(), 0.7, **given)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, broken.state_dict()[key])


def test_nobody_is_told_to_calibrate_who_does(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    model = wrapped("dynamicvit-k0.7")
    tokenprune.calibrate(model, images(), 0.7, fit_steps=2)
    model(images())
    assert not [w for w in recwarn if "untrained predictors" in str(w.message)]
    broken = wrapped("dynamicvit-k0.7")
    with pytest.raises(KeyboardInterrupt):
        tokenprune.calibrate(broken, images(), progress=interrupt)
    with pytest.warns(tokenprune.errors.TokenPruneWarning, match="untrained predictors"):
        broken(images())


def test_a_grid_keeps_its_blocks_and_meets_the_budget() -> None:
    swin = timm.models.swin_transformer.SwinTransformer
    small = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_classes": 3}
    host = swin(**small, depths=(1, 4), num_heads=(2, 2)).eval()
    model = tokenprune.wrap(host, "token-norm-k0.7", verify=False, train=False).eval()
    report = tokenprune.calibrate(model, images(), 0.9)
    assert abs(report.after[1] - 0.9) < 0.02
    assert not report.tried


def test_embeddings_are_compared_by_cosine_and_read_tells_which() -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    host = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (4, 32))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0]}]
    model = tokenprune.wrap(
        host, "merge-k0.7", example_inputs=batches[0] | {"labels": None}, restore=True,
        verify=False, train=False,
    )  # fmt: skip
    with pytest.raises(HostError, match=r"found last_hidden_state. Pass read=, a function"):
        tokenprune.calibrate(model, batches, 0.7, trials=2)
    report = tokenprune.calibrate(
        model, batches, 0.7, trials=2, read=lambda output: output.last_hidden_state.mean(1)
    )
    assert report.distance == "cosine"
    assert report.after[0].agreement is None
    with pytest.raises(HostError, match=r"one row an image, \[4, ...\], found \[32\]"):
        tokenprune.calibrate(model, batches, read=lambda output: output.last_hidden_state[0, 0])


def test_bad_input_of_calibrate() -> None:
    with pytest.raises(HostError, match=r"does not take this batch, \[2, 3, 64, 64\]: Assertion"):
        tokenprune.calibrate(wrapped(), torch.zeros(2, 3, 64, 64))
    with pytest.raises(NotWrappedError, match="A model that tokenprune"):
        tokenprune.calibrate(vit(), images())
    with pytest.raises(PlanError, match=r"asked for divergence='l2': give 'kl' or 'cosine'"):
        tokenprune.calibrate(wrapped(), images(), divergence="l2")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"the least that this model can do is 0\.\d+"):
        tokenprune.calibrate(wrapped(), images(), 0.05)
    with pytest.raises(PlanError, match=r"asked for macs=1\.5"):
        tokenprune.calibrate(wrapped(), images(), 1.5)


def test_compare_shows_methods_and_advises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.tune.compare.TURN", 0.01)
    host = vit()
    labels = host(images()).argmax(1)
    found = tokenprune.compare(
        host, images(), labels, methods=["merge-k0.7", methods.Random(), "evit-k0.7"],
        macs=(0.8, 0.6),
    )  # fmt: skip
    assert [row.method for row in found.rows] == [
        name for name in ("merge-k0.7", "random-k0.7", "evit-k0.7") for _ in range(2)
    ]
    assert found.dense_accuracy == 1.0
    for row in found.rows:
        assert row.seconds is not None
        assert row.trial.accuracy == row.trial.agreement
        assert min(abs(row.macs - macs) for macs in (0.8, 0.6)) < 0.02
    text = str(found)
    assert "8 images, dense accuracy 100.00 %" in text
    assert "points lost" in text
    best = found.best(0.6)
    assert f'tokenprune.wrap(model, "{best.method}")' in found.advice(0.6)
    assert "model.set_budget(0.6)" in found.advice(0.6)
    assert found.plot(tmp_path / "c.png").stat().st_size > 1000
    model = tokenprune.wrap(host, best.method, verify=False, train=False).eval()
    model.set_budget(0.6)
    trial = Reference(host, Batches(host, images()), None, None).trial(model)
    assert trial.divergence == pytest.approx(best.trial.divergence, rel=1e-4)


def test_compare_says_who_is_left_out_and_takes_a_wrapped_model() -> None:
    host = vit(class_token=False, global_pool="avg")
    model = tokenprune.wrap(host, "token-norm-k0.6", verify=False, train=False)
    before = pruning_of(model).budget
    found = tokenprune.compare(model, images(), methods=["topk-k0.7"], macs=(0.7,), timed=False)
    assert [row.method for row in found.rows] == ["this model"]
    assert pruning_of(model).budget is before
    assert "no class token among them" in found.left_out["topk-k0.7"]
    assert "topk-k0.7 is left out: recipe 'topk-k0.7' has" in str(found)
    assert found.dense_accuracy is None
    assert found.advice(0.7) == "model.set_budget(0.7)"
    found = tokenprune.compare(
        host, images(), methods=["random-k0.7"], macs=(0.05, 0.7), timed=False
    )
    assert [round(row.macs, 1) for row in found.rows] == [0.7]
    assert "least that this model can do" in found.left_out["random-k0.7 at 0.05"]
    with pytest.raises(PlanError, match=r"No method serves this VisionTransformer:\n.*class token"):
        tokenprune.compare(host, images(), methods=["topk-k0.7"], timed=False)
    with pytest.raises(HostError, match=r"Labels are from 0 to 9, but .* 5 classes, 0 to 4"):
        tokenprune.compare(host, images(), [*range(7), 9], methods=["merge-k0.7"])


def test_compare_leaves_no_trace_on_the_host() -> None:
    host = vit().train()
    before = dict(vars(host))
    tokenprune.compare(host, images(), methods=["merge-k0.7"], macs=(0.7,), timed=False)
    assert vars(host) == before
    assert host.training


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="Dynamo of torch 2.8 reads no property of a named tuple"
)
def test_a_compiled_model_runs_what_calibrate_chose() -> None:
    model = wrapped(depth=2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(images())
        tokenprune.calibrate(model, images(), 0.6, trials=3)
        torch.testing.assert_close(compiled(images()), model(images()))
