"""Fusing: EViT as published, on every path; class attention as the scorer of it and of removal."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

import tokenprune
from tests.reductions.test_merge import CLASSES, SIZE, images, vit
from tests.toys.vit import randomize_weights
from tokenprune.errors import PlanError
from tokenprune.ops.class_attention import class_weights
from tokenprune.ops.fusing import fuse


def evit(host: Any, x: Tensor, keep: float, blocks: set[int], fused: bool) -> Tensor:
    """EViT written out (Liang et al., 2022): the fused token is appended, and competes later."""
    x = host.patch_embed(x)
    x = host.norm_pre(host.patch_drop(host._pos_embed(x)))
    prefix = host.num_prefix_tokens
    for number, block in enumerate(host.blocks):
        attention, given = block.attn, block.norm1(x)
        batch, length, dim = given.shape
        heads, width = attention.num_heads, dim // attention.num_heads
        q, k, v = attention.qkv(given).view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width)).softmax(-1)
        x = x + block.ls1(attention.proj((weights @ v).transpose(1, 2).flatten(2)))
        if number in blocks:
            scores = weights[:, :, 0, prefix:].mean(1)
            count = math.ceil(keep * (length - prefix))
            order = scores.argsort(1, descending=True)
            rows = []
            for image, score, places in zip(x, scores, order, strict=True):
                best, others = places[:count] + prefix, places[count:]
                parts = [image[:prefix], image[best]]
                if fused:
                    parts.append(
                        (image[others + prefix] * score[others, None]).sum(0, keepdim=True)
                    )
                rows.append(torch.cat(parts))
            x = torch.stack(rows)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return host.forward_head(host.norm(x))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("keep", [0.7, 0.3])
@torch.no_grad()
def test_evit_is_the_papers(name: str, keep: float) -> None:
    host = vit(name)
    model = tokenprune.wrap(host, f"evit-k{keep}", verify=False, train=False).eval()
    expected = evit(host, images(), keep, {1, 2, 3}, fused=True)
    output, trace = model(images(), return_trace=True)
    assert float((output - expected).abs().max() / expected.abs().max()) < 1e-4
    left = [64]
    for stage in trace.stages:
        left.append(math.ceil(keep * left[-1] - 1e-9) + 1)
        assert stage.num_tokens == left[-1]


@torch.no_grad()
def test_class_attention_alone_keeps_the_best() -> None:
    host = vit()
    recipe: dict[str, Any] = {"version": 1, "scorer": "class-attention", "place": "middle"}
    recipe |= {"stages": [{"block": 2, "keep_ratio": 0.5}, {"block": 3, "keep_ratio": 0.25}]}
    model = tokenprune.wrap(host, recipe, verify=False, train=False).eval()
    expected = evit(host, images(), 0.5, {2, 3}, fused=False)
    output = model(images())
    assert float((output - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_fused_token_takes_the_least_kept_one_in_and_reads_no_dropped_one() -> None:
    tokens = torch.tensor([[1.0, 10.0, 100.0, 1000.0, float("nan")]])[..., None].expand(2, -1, 3)
    weights = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0]]).expand(2, -1)
    kept = torch.tensor([[False, True, False, True, False]]).expand(2, -1)
    there = torch.tensor([[True, True, True, True, False], [False, True, False, True, False]])
    fused, place = fuse(tokens, weights, kept, there)
    assert place.tolist() == [[3], [3]]
    torch.testing.assert_close(fused[:, 0], torch.tensor([0.1 + 20 + 300, 1000.0]))


def test_hidden_tokens_take_no_attention() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0, float("nan")]]])
    weights = class_weights(logits, torch.tensor([[1.0, 1.0, 0.0]]), 3)
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)[1:]
    torch.testing.assert_close(weights, torch.cat([expected, torch.zeros(1)])[None])


@pytest.mark.parametrize("name", ["evit-k0.6", "topk-k0.6"])
def test_it_is_proven_trains_on_its_own_path_and_saves(name: str, tmp_path: Path) -> None:
    host = vit()
    model = tokenprune.wrap(host, name).train()
    assert list(model.state_dict()) == list(host.state_dict())
    output, trace = model(images(), return_trace=True)
    output.sum().backward()
    assert trace.patch_tokens.shape[1] == trace.stages[-1].num_tokens
    assert all(p.grad is not None for n, p in host.named_parameters() if "norm.bias" in n)
    model.eval()
    with torch.no_grad():
        loaded = tokenprune.load(tokenprune.save(model, tmp_path / "m"), vit(), verify=False)
        assert torch.equal(loaded.eval()(images()), model(images()))


@pytest.mark.parametrize(
    "build",
    [
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
                image_size=SIZE, patch_size=4, attn_implementation="eager",
            )
        ),
        lambda: timm.models.eva.Eva(
            img_size=SIZE, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=CLASSES,
            use_rot_pos_emb=True, use_abs_pos_emb=False,
        ),
        lambda: timm.models.beit.Beit(
            img_size=SIZE, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=CLASSES,
            use_rel_pos_bias=True, use_abs_pos_emb=False,
        ),
    ],
    ids=["attention that forms its logits", "rope", "relative bias"],
)  # fmt: skip
def test_attention_of_every_kind(build: Any) -> None:
    """Positions of the tokens that are left reach the class token's logits on both paths."""
    torch.manual_seed(0)
    host = build().eval()
    randomize_weights(host, 3.0)
    certificate = tokenprune.verify(tokenprune.wrap(host, "evit-k0.6", train=False), images())
    assert "mask = gather" in str(certificate)


def test_what_it_needs_is_said() -> None:
    host = vit("vit_tiny_patch16_224", class_token=False, global_pool="avg")
    with pytest.raises(PlanError, match=r"this host has none .* found 0 prefix tokens.*merge-k0.7"):
        tokenprune.wrap(host, "evit-k0.7")
    registers = vit("vit_tiny_patch16_224", class_token=False, reg_tokens=4, global_pool="avg")
    with pytest.raises(PlanError, match="found 4 prefix tokens, no class token among them"):
        tokenprune.wrap(registers, "topk-k0.7")
    recipe = {"version": 1, "mode": "fuse", "scorer": "token-norm"}
    recipe |= {"schedule": {"keep_ratio": 0.7}}
    with pytest.raises(PlanError, match=r"says too little for `mode: fuse`; .* class-attention"):
        tokenprune.wrap(vit(), recipe)
