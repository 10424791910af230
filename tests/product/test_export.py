"""Export: files that others run, checked before they are left behind."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
import yaml
from jaxtyping import config
from torch import Tensor, nn
from typer.testing import CliRunner

import tokenprune
from tests.product.export_hosts import HALF, HOSTS, TINY, images, tensors_of, wrapped
from tests.zoo.sequences import TEXT, texts
from tokenprune.cli.app import app
from tokenprune.errors import ExportError, MissingDependencyError, NotWrappedError
from tokenprune.exporting import write as export_module
from tokenprune.exporting.check import compare, margins
from tokenprune.exporting.run import named_tensors, open_exported

OPTIONS = [f"{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def _no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the annotations, which only tests put there, see no open batch size."""
    monkeypatch.setattr(config, "jaxtyping_disable", True)


def eager(model: Any) -> Callable[[Any], dict[str, Tensor]]:
    """A faithful file."""
    return lambda inputs: named_tensors(model(**inputs))


@pytest.fixture
def no_exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A few bytes are written, and opened as a faithful file, instead of seconds of export."""
    monkeypatch.setattr(export_module, "_export", lambda model, example: (model, ("output",)))
    monkeypatch.setattr(
        export_module, "_write", lambda host, program, file, *rest: file.write_text("new")
    )
    monkeypatch.setattr(
        export_module, "open_exported", lambda file, format, device: eager(wrapped("deit"))
    )


@pytest.mark.parametrize("name", HOSTS)
def test_onnx_computes_what_the_model_computes(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, file = wrapped(name), tmp_path / "model.onnx"
    report = tokenprune.export(model, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert report.num_bytes == file.stat().st_size
    assert report.checked == (1, 5)
    assert 0 <= report.deviation < report.tolerance == 1e-4
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [given.name for given in session.get_outputs()] == list(report.outputs)
    assert report.outputs == (("logits",) if name == "vit" else ("output",))
    for batch in (1, 2, 4):
        given = images(name, batch)
        with torch.no_grad():
            wanted = tensors_of(model(**given))
        found = session.run(None, {key: value.numpy() for key, value in given.items()})
        for one, other in zip(found, wanted, strict=True):
            apart = (torch.from_numpy(one) - other).abs().amax() / other.abs().amax()
            assert apart < 1e-4


def test_pt2_runs_any_batch_size_and_modes_are_kept(tmp_path: Path) -> None:
    model = wrapped("vit").train()
    model.vit.layers[0].eval()
    given = images("vit", 1)  # one image: torch.export would fix the batch size to it
    report = tokenprune.export(model, tmp_path / "a" / "model.pt2", example_inputs=given)
    assert report.deviation == 0
    assert model.training
    assert not model.vit.layers[0].training
    run = open_exported(report.path)
    model.eval()
    for batch in (1, 3):
        given = images("vit", batch)
        with torch.no_grad():
            torch.testing.assert_close(run(given)["logits"], model(**given).logits)


def test_two_inputs_share_the_batch_size() -> None:
    """ONNX's exporter takes the program apart, with the check that both batch sizes are one."""
    one_layer = transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1})
    host = transformers.BertForSequenceClassification(one_layer).eval()
    given = texts(3, 8, "input_ids")
    model = tokenprune.wrap(host, HALF, example_inputs=given, verify=False, train=False).eval()
    with torch.no_grad():
        program, outputs = export_module._export(model, given)
        program.run_decompositions()  # fails on a check that names no input
        other = texts(5, 16, "input_ids")
        other = {name: value[:, :8] for name, value in other.items()}
        torch.testing.assert_close(program.module()(**other)["logits"], model(**other).logits)
    assert outputs == ("logits",)


def test_what_is_forced_is_what_is_written(tmp_path: Path) -> None:
    model = wrapped("deit")
    with model.using("dense"):
        report = tokenprune.export(model, tmp_path / "dense.pt2")
    given = images("deit", 3)
    with torch.no_grad():
        dense = tokenprune.unwrap(model)(**given)
        assert not torch.allclose(dense, model(**given), atol=1e-3)
        torch.testing.assert_close(open_exported(report.path)(given)["output"], dense)


@pytest.mark.usefixtures("no_exporter")
def test_a_file_that_fails_the_check_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = wrapped("deit"), tmp_path / "model.pt2"
    file.write_text("old")

    def off(file: Path, format: str, device: torch.device) -> Any:
        assert file.read_text() == "new"
        return lambda inputs: {"output": model(**inputs) * 1.001}

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "open_exported", off)
        message = (
            r"does not compute what VisionTransformer does: at batch size 1 output 'output' is"
        )
        with pytest.raises(ExportError, match=message):
            tokenprune.export(model, file)
        assert file.read_text() == "old"
        assert tokenprune.export(model, file, check=False).deviation is None
    assert file.read_text() == "new"
    file.unlink()
    assert tokenprune.export(model, file).deviation == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.usefixtures("no_exporter")
def test_weights_beside_the_file_move_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(host: str, program: Any, file: Path, *rest: Any) -> None:
        file.write_text("graph")
        file.with_name(f"{file.name}.data").write_text("weights")

    monkeypatch.setattr(export_module, "_write", write)
    report = tokenprune.export(wrapped("deit"), tmp_path / "model.onnx")
    assert report.num_bytes == len("graph") + len("weights")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_what_the_exporters_refuse(
    format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("outer") from ValueError("no such operator")

    if format == "onnx":
        monkeypatch.setattr(export_module, "_export", lambda model, example: (model, ("output",)))
        monkeypatch.setattr(torch.onnx, "export", refuse)
    monkeypatch.setattr(torch.export, "export", refuse)
    message = r"VisionTransformer cannot be exported. .* says: ValueError: no such operator\nRun"
    with pytest.raises(ExportError, match=message):
        tokenprune.export(wrapped("deit"), tmp_path / f"model.{format}")
    assert not list(tmp_path.iterdir())


def test_what_export_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = wrapped("deit"), tmp_path / "model.onnx"
    with pytest.raises(NotWrappedError, match=r"Call tokenprune.wrap"):
        tokenprune.export(nn.Linear(2, 2), file)
    with pytest.raises(ExportError, match=r"exported as 'onnx' or 'pt2', found '.*model.bin'"):
        tokenprune.export(model, tmp_path / "model.bin")
    with pytest.raises(ExportError, match=r"found format 'tflite'. Pass format="):
        tokenprune.export(model, file, "tflite")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"is a directory. Name the file"):
        tokenprune.export(model, tmp_path, "pt2")
    hook, own = (
        model.register_forward_hook(lambda m, x, out: out * 2),
        "has forward hooks of its own",
    )
    with hook, pytest.raises(ExportError, match=own):
        tokenprune.export(model, file)
    sets = [torch.arange(4).expand(2, -1)]
    with model.using(keep_indices=sets), pytest.raises(ExportError, match=r"keep_indices are forc"):
        tokenprune.export(model, file)
    programs = next(iter(model._pruning.cache))
    bound = replace(programs.analysis, batch_bound=True)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "analysis", bound)
        with pytest.raises(ExportError, match=r"depends on the batch size"):
            tokenprune.export(model, file)
    narrow = tokenprune.wrap(HOSTS["deit"].make().bfloat16(), HALF, verify=False, train=False)
    with pytest.raises(ExportError, match=r"is bfloat16, which onnxruntime cannot run"):
        tokenprune.export(narrow, file)
    with pytest.raises(ExportError, match=r"on the meta device and holds no weights"):
        tokenprune.export(narrow.to("meta"), file)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokenprune-torch\[export\]'"):
        tokenprune.export(model, file)
    assert not list(tmp_path.iterdir())


def same(out: Tensor) -> dict[str, Tensor]:
    return {"output": out}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: {"other": out}, r"'f' returns other; the model returns output"),
        (lambda out: same(out[:, :-1]), r"batch size 2 output 'output' is off by inf"),
        (lambda out: same(out * float("nan")), r"off by inf of its scale"),
        (lambda out: same(out.flip(0)), r"and rounding may cause 1e-04. Nothing was written.$"),
        (lambda out: same(out + 2e-4 * out.abs().amax()), r"off by 2.0e-04 of its scale"),
    ],
)
def test_what_the_check_sees(change: Callable[[Tensor], Any], message: str) -> None:
    model = wrapped("deit")
    with torch.no_grad():
        compare(model, lambda inputs: same(model(**inputs) * 1.00002), images("deit", 2), (2,), "f")
        with pytest.raises(ExportError, match=message):
            compare(model, lambda inputs: change(model(**inputs)), images("deit", 2), (2,), "f")


def test_a_model_that_is_not_decided_is_said_to_be_so() -> None:
    """All tokens score alike: a file that rounds otherwise keeps others, and nothing can tell."""
    model = tokenprune.wrap(HOSTS["deit"].make(), HALF, verify=False, train=False).eval()
    last = [module for module in model.token_predictors.modules() if isinstance(module, nn.Linear)]
    nn.init.zeros_(last[-1].weight)
    with torch.no_grad():
        assert margins(model, images("deit", 3)).tolist() == [0, 0, 0]
        compare(model, eager(model), images("deit", 2), (1,), "f")
        with pytest.raises(ExportError, match=r"only 0.0e\+00 in log-probability"):
            compare(model, lambda inputs: same(model(**inputs) + 1), images("deit", 2), (1,), "f")


@pytest.mark.parametrize("path", ["gather", "mask"])
@pytest.mark.parametrize("name", ["deit", "swin"])
def test_margins_are_the_gap_at_the_last_kept_token(name: str, path: Any) -> None:
    model, given = wrapped(name), images(name, 3)
    with torch.no_grad(), model.using(path):
        found = margins(model, given)
        _, trace = model(**given, return_trace=True)
    (stage,) = trace.stages
    score = stage.keep_logits[..., 0].sort(dim=1, descending=True).values
    count = score.shape[1] // 2
    torch.testing.assert_close(found, score[:, count - 1] - score[:, count])
    assert (found > 0).all()


def test_margins_without_a_choice() -> None:
    model = wrapped("deit")
    with torch.no_grad(), model.using("dense"):
        assert margins(model, images("deit", 2)).tolist() == [float("inf")] * 2


def test_tensors_are_named() -> None:
    @dataclass
    class Output:
        logits: Tensor
        states: tuple[Any, ...]

    one = torch.zeros(1)
    assert named_tensors(one).keys() == {"output"}
    nested = {"a": Output(one, (one, None, [one])), "b": 3}
    assert list(named_tensors(nested)) == ["a.logits", "a.states.0", "a.states.2.0"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments], env={"COLUMNS": "140"})


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "pruned.pt2"
    recipe = tmp_path / "half.yaml"
    recipe.write_text(yaml.safe_dump(HALF))
    asked = ("--recipe", str(recipe), "--output", str(file), "--rounds", "1")
    result = run("deit_tiny_patch16_224", *OPTIONS, *asked)
    assert result.exit_code == 0, result.output
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert table["size"][0] == f"{file.stat().st_size / 1e6:.1f} MB"
    assert table["largest deviation from eager"] == ["0.0e+00", "0.0e+00"]
    pruned, dense = map(float, table["images/s at batch size 8"])
    assert float(table["speed-up"][0].removesuffix("x")) == pytest.approx(pruned / dense, abs=0.02)
    assert 0 < float(table["MACs, relative to dense"][0]) < 1
    assert f"Written to {file}" in result.stdout.replace("\n", "")


@pytest.mark.usefixtures("no_exporter")
def test_the_command_on_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = {"library": "timm", "model": "deit_tiny_patch16_224", "kwargs": TINY}
    recipe = {**HALF, "host": host}
    tokenprune.save(
        tokenprune.wrap(HOSTS["deit"].make(), recipe, verify=False, train=False), tmp_path / "run"
    )
    monkeypatch.chdir(tmp_path)
    result = run("run", "--format", "pt2", "--rounds", "0", "--keep-ratio", "0.25")
    monkeypatch.setattr(export_module, "open_exported", lambda *given: eager(wrapped("deit")))
    assert result.exit_code == 2  # the faithful file is another model's
    assert "error: 'run.pt2' does not compute what VisionTransformer does" in result.stderr
    result = run("run", "--recipe", "dynamicvit-deit-tiny-k0.7")
    assert result.exit_code == 2
    assert "--recipe is for building a model by name; 'run' is a folder" in result.stderr


def test_what_the_command_refuses() -> None:
    assert "found format 'tflite'" in run("deit_tiny_patch16_224", "-f", "tflite").stderr
    result = run("transformers:vit", "--pretrained")
    assert result.exit_code == 2
    assert "'transformers:vit' names no published weights" in result.stderr


@pytest.mark.parametrize("mode", ["merge", "fuse"])
def test_merged_and_fused_models_are_exported(mode: str, tmp_path: Path) -> None:
    """Their file is compared with the model."""
    host = HOSTS["deit"].make().eval()
    recipe = {**HALF, "mode": mode, "place": "middle"}
    model = tokenprune.wrap(host, recipe, verify=False, train=False).eval()
    model.set_budget(0.8)
    report = tokenprune.export(model, tmp_path / "model.onnx")
    assert report.deviation < 1e-4


def test_windows_are_exported_with_an_open_batch(tmp_path: Path) -> None:
    recipe = {"version": 1, "mode": "windows", "scorer": "token-norm"}
    recipe |= {"stages": [{"block": 0, "keep_ratio": 0.5}]}
    model = tokenprune.wrap(HOSTS["swin"].make().eval(), recipe, verify=False, train=False).eval()
    assert tokenprune.export(model, tmp_path / "model.pt2").deviation < 1e-4


def test_merged_tokens_are_put_back_in_a_file_with_an_open_batch(tmp_path: Path) -> None:
    options = {**TINY, "num_classes": 0, "global_pool": ""}
    host = timm.create_model("deit_tiny_patch16_224", **options).eval()
    recipe = {**HALF, "mode": "merge", "place": "middle"}
    model = tokenprune.wrap(host, recipe, restore=True, verify=False, train=False).eval()
    assert tokenprune.export(model, tmp_path / "model.pt2").deviation < 1e-4
