"""Hosts from recipes: both libraries, sizes, channels, heads; and what they refuse."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tokenprune
from tokenprune.errors import HostError, PlanError, UnsupportedHostError
from tokenprune.losses.logits import class_logits
from tokenprune.recipe import load_recipe
from tokenprune.recipe.schema import HostSection
from tokenprune.train import build_host, input_settings

TIMM: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
HF: dict[str, Any] = {"patch_size": 8, "hidden_size": 16}
HF |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def timm_section(model: str = "vit_tiny_patch16_224", **kwargs: Any) -> HostSection:
    return HostSection(library="timm", model=model, kwargs={**TIMM, **kwargs})


def hf_section(model: str = "vit", **kwargs: Any) -> HostSection:
    return HostSection(library="transformers", model=model, kwargs={**HF, **kwargs})


BERT = HostSection(library="transformers", model="bert")


@pytest.mark.parametrize(
    ("section", "in_chans"),
    [
        (timm_section(), 3),
        (timm_section("lvvit_t", stem_width=8), 1),
        (hf_section("vit"), 1),
        (hf_section("dinov2"), 3),
        (hf_section("deit"), 3),
    ],
    ids=lambda value: getattr(value, "model", str(value)),
)
def test_host_has_the_size_channels_and_head_asked_for(section: HostSection, in_chans: int) -> None:
    host = build_host(section, 7, image_size=16, in_chans=in_chans).eval()
    logits = class_logits(host(torch.zeros(2, in_chans, 16, 16)), 7)
    assert logits.shape == (2, 7)
    tokenprune.wrap(host, {"version": 1, "schedule": {"blocks": [1], "keep_ratio": 0.5}})


@pytest.mark.parametrize("section", [timm_section(), hf_section("dinov2")], ids=["timm", "hf"])
def test_drop_path_reaches_the_host(section: HostSection) -> None:
    def drops(host: torch.nn.Module) -> list[float]:
        return [
            m.drop_prob for m in host.modules() if "DropPath" in type(m).__name__ and m.drop_prob
        ]

    assert max(drops(build_host(section, 3, image_size=16, drop_path=0.3))) == pytest.approx(0.3)
    assert not drops(build_host(section, 3, image_size=16))


def test_drop_path_that_a_host_has_not_is_refused() -> None:
    with pytest.raises(HostError, match=r"ViTConfig has no stochastic depth, but drop_path=0\.1"):
        build_host(hf_section("vit"), 3, image_size=16, drop_path=0.1)


def test_settings_follow_the_host_and_its_weights() -> None:
    section = load_recipe("dynamicvit-deit-small-k0.7").host
    assert section is not None
    published = input_settings(section, pretrained=True)
    assert published["image_size"] == 224
    assert published["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert input_settings(section, image_size=96)["image_size"] == 96
    assert input_settings(section)["mean"] == (0.5, 0.5, 0.5)
    small = timm_section(img_size=32, in_chans=1)
    assert (input_settings(small)["image_size"], input_settings(small)["std"]) == (32, (0.5,))
    other = hf_section(image_size=48, num_channels=1)
    assert (input_settings(other)["image_size"], input_settings(other)["mean"]) == (48, (0.5,))


def test_a_saved_checkpoint_of_transformers_is_a_host(tmp_path: Path) -> None:
    host: Any = build_host(hf_section("vit"), 3, image_size=16)
    host.save_pretrained(tmp_path)
    section = HostSection(library="transformers", model=str(tmp_path))
    loaded = build_host(section, 5, pretrained=True)
    name = "vit.embeddings.position_embeddings"
    assert torch.equal(loaded.get_parameter(name), host.get_parameter(name))
    assert class_logits(loaded(torch.zeros(1, 3, 16, 16)), 5).shape == (1, 5)
    with pytest.raises(HostError, match=r"other shapes for \['vit\.embeddings\.position_embed"):
        build_host(section, 3, image_size=24, pretrained=True)


@pytest.mark.parametrize(
    ("section", "options", "error", "message"),
    [
        (timm_section("vit_tiny_patch16_225"), {}, UnsupportedHostError, "Did you mean 'vit_tiny_"),
        (hf_section("vitt?"), {}, UnsupportedHostError, r"checkpoint .vitt\?.*Did you mean .vit"),
        (hf_section("vit"), {"pretrained": True}, UnsupportedHostError, "is a model type"),
        (timm_section(widht=3), {}, HostError, r"cannot build .*'widht': 3.*TypeError"),
        (hf_section(hiden_size=8), {}, HostError, "ViTConfig has no option 'hiden_size'. Did you"),
        (BERT, {}, HostError, r"transformers cannot build 'bert'"),
    ],
)
def test_faults_are_named(
    section: HostSection, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_host(section, 3, **options)


def test_logits_are_found_in_every_kind_of_output() -> None:
    logits = torch.zeros(2, 3)
    for output in (logits, (logits, torch.ones(2, 3)), SimpleNamespace(logits=logits)):
        assert class_logits(output, 3) is logits
    with pytest.raises(
        PlanError, match=r"data has 4 classes, .* head has 3\s+outputs.*num_classes=4"
    ):
        class_logits(logits, 4)
    with pytest.raises(HostError, match=r"returned a tensor \(2, 3, 4\)"):
        class_logits(torch.zeros(2, 3, 4), 4)
    with pytest.raises(HostError, match="returned SimpleNamespace"):
        class_logits(SimpleNamespace(last_hidden_state=logits), 4)


def test_a_host_without_a_size_of_its_own_takes_any() -> None:
    """PVT's position is in its convolutions: timm builds it without an image size."""
    kwargs = {"embed_dims": [8, 16, 16, 16], "num_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1]}
    with pytest.raises(UnsupportedHostError, match="timm has no model named 'runs/pvt_v2_b0'"):
        build_host(HostSection(library="timm", model="runs/pvt_v2_b0"))
    section = HostSection(library="timm", model="pvt_v2_b0", kwargs=kwargs)
    host = build_host(section, 3, image_size=64).eval()
    assert host(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    cvt = HostSection(library="transformers", model="cvt")
    assert input_settings(cvt)["image_size"] == 224
