"""LV-ViT against a forward written here from the paper, and its surface as a timm model."""

import importlib
import math
import re
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import tokenprune.models
from tokenprune.errors import HostError, MissingDependencyError
from tokenprune.models import LVViT

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 3.0,
    "stem_width": 8,
}


def small_model(**options: object) -> LVViT:
    """A model with weights far from their start, so that every term of the forward shows."""
    generator = torch.Generator().manual_seed(0)
    model = LVViT(**{**SMALL, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.ndim > 1 else 1.0
                noise = torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in)
                tensor.copy_(noise if tensor.ndim > 1 else 0.5 + noise.abs())
    return model.eval()


def images(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def reference(w: dict[str, Tensor], x: Tensor, depth: int, heads: int, skip_lam: float) -> Tensor:
    """The eval logits [B, num_classes] by the formulas of arXiv 2104.10858, on plain tensors."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    for i, stride in enumerate((2, 1, 1), start=1):
        kernel = w[f"patch_embed.conv{i}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        bn = f"patch_embed.bn{i}"
        scale = w[f"{bn}.weight"] / (w[f"{bn}.running_var"] + 1e-5).sqrt()
        shift = w[f"{bn}.bias"] - w[f"{bn}.running_mean"] * scale
        x = (x * scale[:, None, None] + shift[:, None, None]).clamp_min(0)
    kernel = w["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1])
    batch, dim, height, width = x.shape
    x = x.permute(0, 2, 3, 1).reshape(batch, height * width, dim)
    x = torch.cat([w["cls_token"].repeat(batch, 1, 1), x], 1) + w["pos_embed"]

    for i in range(depth):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        mixed = []
        for head in range(heads):
            span = slice(head * dim // heads, (head + 1) * dim // heads)
            q, k, v = (part[..., span] for part in qkv.split(dim, -1))
            scores = q @ k.transpose(1, 2) / math.sqrt(dim / heads)
            mixed.append(scores.softmax(-1) @ v)
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(mixed, -1)) / skip_lam
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(hidden)) / skip_lam

    x = norm("norm", x)
    best = linear("aux_head", x[:, 1:]).max(1).values
    return linear("head", x[:, 0]) + 0.5 * best


@pytest.mark.parametrize("skip_lam", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_logits_are_those_of_the_formulas(skip_lam: float, qkv_bias: bool) -> None:
    model = small_model(skip_lam=skip_lam, qkv_bias=qkv_bias).double()
    x = images().double()
    with torch.no_grad():
        want = reference(dict(model.state_dict()), x, depth=3, heads=2, skip_lam=skip_lam)
        torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    assert want.std() > 0.1, "the comparison must not be one of zeros"


def test_training_forms_the_same_output_as_eval() -> None:
    model = small_model()
    with torch.no_grad():
        want = model(images())
        model.train()
        model.patch_embed.eval()  # its batch statistics are the only difference between the modes
        torch.testing.assert_close(model(images()), want)


def test_the_parts_make_up_the_output() -> None:
    model = small_model()
    with torch.no_grad():
        class_logits, token_logits = model(images(), return_parts=True)
        assert class_logits.shape == (2, 7)
        assert token_logits.shape == (2, 16, 7)
        together = class_logits + 0.5 * token_logits.max(1).values
        torch.testing.assert_close(model(images()), together)


def test_gradient_reaches_every_parameter() -> None:
    model = small_model(drop_path_rate=0.1).train()
    model(images(batch=4)).logsumexp(-1).sum().backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert without == []


def test_names_are_those_of_the_release() -> None:
    with torch.device("meta"):
        names = list(timm.create_model("lvvit_s").state_dict())
    top_level = sorted({name.partition(".")[0] for name in names})
    assert top_level == [
        *("aux_head", "blocks", "cls_token", "head", "norm", "patch_embed", "pos_embed")
    ]
    assert [name for name in names if name.startswith("blocks.0.")] == [
        "blocks.0.norm1.weight",
        "blocks.0.norm1.bias",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.attn.proj.bias",
        "blocks.0.norm2.weight",
        "blocks.0.norm2.bias",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc1.bias",
        "blocks.0.mlp.fc2.weight",
        "blocks.0.mlp.fc2.bias",
    ]
    stem = sorted({re.sub(r"\.[a-z_]+$", "", name) for name in names if "patch_embed" in name})
    layers = ("bn1", "bn2", "bn3", "conv1", "conv2", "conv3", "proj")
    assert stem == [f"patch_embed.{layer}" for layer in layers]
    assert len(names) == 204


@pytest.mark.parametrize(
    ("name", "size", "millions", "skip_lam"),
    [
        ("lvvit_t", 224, 8.53, 1.0),
        ("lvvit_s", 224, 26.15, 2.0),
        ("lvvit_s", 384, 26.30, 2.0),
        ("lvvit_m", 224, 55.83, 2.0),
        ("lvvit_m", 448, 56.13, 2.0),
        ("lvvit_l", 448, 150.47, 3.0),
    ],
)
def test_sizes_are_the_published_ones(
    name: str, size: int, millions: float, skip_lam: float
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.01)
    assert {block.skip_lam for block in model.blocks} == {skip_lam}


def test_import_registers_the_four_models() -> None:
    names = ["lvvit_l", "lvvit_m", "lvvit_s", "lvvit_t"]
    assert timm.list_models("lvvit*") == names
    assert sorted(set(tokenprune.models.__all__) - {"LVViT"}) == names


def test_timm_surface() -> None:
    model = timm.create_model("lvvit_t", num_classes=5, in_chans=1, drop_path_rate=0.2).eval()
    assert isinstance(model, LVViT)
    assert model.num_prefix_tokens == 1
    assert model.num_features == model.embed_dim == 240
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert model.default_cfg["classifier"] == ("head", "aux_head")
    assert model.get_classifier().out_features == model.aux_head.out_features == 5
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    with torch.no_grad():
        tokens = model.forward_features(torch.zeros(1, 1, 224, 224))
        assert tokens.shape == (1, 197, 240)
        assert model.forward_head(tokens, pre_logits=True).equal(tokens[:, 0])
        assert model.forward_head(tokens).shape == (1, 5)


def test_reset_classifier_replaces_both_heads() -> None:
    model = small_model()
    model.reset_classifier(3)
    with torch.no_grad():
        assert model(images()).shape == (2, 3)
        assert model.aux_head.out_features == 3
        model.reset_classifier(0)
        assert model(images()).equal(model.forward_features(images())[:, 0])


def test_another_image_size() -> None:
    model = timm.create_model("lvvit_t", img_size=288, num_classes=4).eval()
    assert model.pos_embed.shape == (1, 1 + 18 * 18, 240)
    with torch.no_grad():
        assert model(images(288, batch=1)).isfinite().all()


def test_a_file_for_another_image_size_is_resized(tmp_path: object) -> None:
    path = f"{tmp_path}/lvvit_t.pth"
    source = timm.create_model("lvvit_t")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    overlay = {"file": path}
    same = timm.create_model("lvvit_t", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(v.equal(source.state_dict()[k]) for k, v in same.state_dict().items())
    larger = timm.create_model(
        "lvvit_t", pretrained=True, pretrained_cfg_overlay=overlay, img_size=256
    )
    assert larger.pos_embed.shape == (1, 1 + 16 * 16, 240)
    assert larger.pos_embed[:, 0].equal(source.pos_embed[:, 0])
    assert larger.blocks[3].attn.qkv.weight.equal(source.blocks[3].attn.qkv.weight)


def test_an_image_of_another_size_is_refused() -> None:
    message = r"takes images of 32x32 pixels, got 40x32\. .*img_size=\(40, 32\)"
    with pytest.raises(HostError, match=message):
        small_model()(torch.zeros(1, 3, 40, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 30}, r"multiple of patch_size=8, got 30x30"),
        ({"img_size": 0}, r"multiple of patch_size=8, got 0x0"),
        ({"patch_size": 1}, r"patch_size must be an even number from 2 on, got 1"),
        ({"num_heads": 5}, r"multiple of num_heads=5, got 24"),
        ({"num_classes": -1}, r"num_classes must be 0 or more, got -1"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(HostError, match=message):
        LVViT(**{**SMALL, **options})  # type: ignore[arg-type]


def test_other_pooling_is_refused() -> None:
    with pytest.raises(HostError, match=r"no pooling but the class token: global_pool='avg'"):
        small_model().reset_classifier(3, global_pool="avg")
    with pytest.raises(HostError, match=r"no pooling but the class token: global_pool='avg'"):
        small_model(global_pool="avg")


def test_plain_fx_traces_it_and_keeps_the_size_check() -> None:
    model = small_model()
    graph = fx.symbolic_trace(model, concrete_args={"return_parts": False})
    with torch.no_grad():
        assert graph(images(batch=3)).equal(model(images(batch=3)))
        with pytest.raises(HostError, match="takes images of 32x32 pixels, got 48x48"):
            graph(images(48))


def test_without_timm_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("tokenprune.models", "tokenprune.models.lvvit"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tokenprune-torch\[timm\]'"):
        importlib.import_module("tokenprune.models")
