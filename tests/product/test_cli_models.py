"""Every way in which a command line may name a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models._hub import save_for_hf

import tokenprune
from tests.product.client_hosts import hf_vit, vit, wrapped
from tests.product.test_cli import SMALL_VIT, run
from tokenprune.cli.hosts import parse_options

OWN = """
from tests.analysis.test_reading import Pairs
from tests.product.client_hosts import vit, wrapped


def host(seed: int = 0):
    return vit(seed)


def pruned():
    return wrapped(vit())


def pairs():
    host = Pairs(4)
    host.image_size = 16
    return host


def number():
    return 3
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the same small model in every form that a name can have."""
    (tmp_path / "owners_code.py").write_text(OWN)
    host = timm.create_model("vit_tiny_patch16_224", **dict(map(_pair, SMALL_VIT)))
    save_for_hf(host, tmp_path / "timm", safe_serialization=True)
    hf_vit().save_pretrained(tmp_path / "transformers")
    shutil.copy(tmp_path / "transformers" / "config.json", tmp_path / "vit.json")
    tokenprune.save(wrapped(vit()), tmp_path / "no_library")
    wrapped(hf_vit()).save_pretrained(tmp_path / "saved", certify=False, card=False)
    configs = {"broken": "{", "other": '{"a": 1}', "newer": CONFIG}
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


CONFIG = '{"model_type": "vit", "architectures": ["ViTForEverything"]}'


def _pair(text: str) -> tuple[str, Any]:
    return next(iter(parse_options([text]).items()))


def profiled(*arguments: str) -> dict[str, Any]:
    wrapped = {"owners_code:pruned", "saved", "no_library"} & {arguments[0]}
    recipe = [] if wrapped else ["--recipe", "dynamicvit-k0.7"]  # auto plans a dozen others
    result = run("inspect", *arguments, *recipe, "--no-proof", "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_way_to_name_a_model(places: Path) -> None:
    for name in ("owners_code:host", "owners_code.py:host", "owners_code:pruned", "timm"):
        assert profiled(name)["profile"]["num_patches"] == 16
    for name in ("transformers", "vit.json", "saved", f"transformers:{places / 'transformers'}"):
        assert profiled(name)["profile"]["host"] == "ViTForImageClassification"
    assert profiled("owners_code:pairs")["profile"]["blocks"][3] == "layers.3"
    assert (
        "of class ModuleList, layers.0 to layers."
        in run("inspect", "owners_code:pairs", "--recipe", "dynamicvit-k0.7").output
    )
    assert profiled("owners_code:host", "seed=3")["adapter"] == "timm/vision_transformer"
    assert profiled("vit.json", "num_hidden_layers=3")["profile"]["blocks"][2] == "vit.layers.2"
    few = ("--method", "merge-k0.7", "--macs", "0.8", "--images", "4", "--no-timed", "--json")
    compared = json.loads(run("compare", "transformers", *few).stdout)
    assert (compared["images"], compared["dense_accuracy"]) == (4, None)
    given = profiled("no_library", "--host", "owners_code:host", "--option", "seed=1")
    assert given["kept"] == [8, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["owners_code:nothing"], "has no function 'nothing'"),
        (["owners_code:number"], "returned int, where a torch.nn.Module is needed"),
        (["owners_code:host", "sed=1"], "cannot be called with {'sed': 1}"),
        (["owners_code:pruned", "--recipe", "merge-k0.7"], "Leave --recipe out"),
        (["transformers", "--pretrained"], "has its own weights"),
        (["timm", "--host", "x"], "--host is for a folder, 'timm' is none"),
        (["broken"], "is no configuration"),
        (["other"], "has neither `architecture`"),
        (["newer"], "is of the class 'ViTForEverything', which transformers"),
        (["no_library"], "names no host to build. Give it with --host"),
        (["nowhere:host"], "Models come from timm or transformers, found 'nowhere'"),
    ],
)
def test_names_that_do_not_fit(arguments: list[str], message: str, places: Path) -> None:
    result = run("inspect", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
