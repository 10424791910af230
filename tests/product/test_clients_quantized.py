"""Quantized hosts: torchao before and after `wrap`; torch.ao is refused by name."""

import pytest
import timm
import torch
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat, quantize_dynamic
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import tokenprune
from tests.product.client_hosts import IMAGES, hf_vit, keeping_all, logits, rewrapped, vit, wrapped
from tokenprune.errors import UnsupportedHostError

CONFIGS = [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig]


@pytest.mark.parametrize("make", [vit, hf_vit])
@pytest.mark.parametrize("config", CONFIGS)
def test_torchao_before_and_after(make: type, config: type) -> None:
    model = wrapped(make())
    plain = logits(model)
    quantize_(tokenprune.unwrap(model), config())
    found = logits(model)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, atol=0.05, rtol=0)
    host = make()
    quantize_(host, config())
    anew = rewrapped(host, model)
    assert torch.equal(logits(anew), found)
    assert torch.equal(keeping_all(anew), logits(host))
    tokenprune.verify(anew)


@pytest.mark.parametrize("before", [True, False])
def test_rounding_to_whole_numbers_is_proven_operator_by_operator(before: bool) -> None:
    """A rounding error of a path takes a value to the next whole number, and the layers run in no
    other dtype, so that the paths can only be compared step by step."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 2}
    host = timm.models.vision_transformer.VisionTransformer(num_classes=5, **size).eval()
    config = Int8DynamicActivationInt8WeightConfig()
    if before:
        quantize_(host, config)
    model = tokenprune.wrap(host, "merge-k0.7", example_inputs=IMAGES, train=False)
    if not before:
        quantize_(host, config)
        model(IMAGES)
    certificate = tokenprune.verify(model, IMAGES)
    assert any("operator by operator (float32" in check.name for check in certificate.checks)


def test_torchao_quantizes_the_predictors_as_well() -> None:
    model = wrapped(vit())
    quantize_(model, Int8WeightOnlyConfig())
    weight = model.token_predictors[0].out_proj[0].weight
    assert type(weight) is not nn.Parameter
    assert torch.equal(keeping_all(model), logits(tokenprune.unwrap(model)))
    tokenprune.verify(model, gradients=False)


@pytest.mark.filterwarnings("ignore:torch.*deprecated")
@pytest.mark.parametrize("before", [True, False])
def test_dynamic_quantization_of_torch_is_refused(before: bool) -> None:
    said = r"Module 'blocks\.0\.attn\.qkv' of VisionTransformer was quantized by torch\.ao\.quant"
    if before:
        host = quantize_dynamic(vit(), {nn.Linear})
        with pytest.raises(UnsupportedHostError, match=said):
            wrapped(host)
        return
    model = wrapped(vit())
    wanted = logits(model)
    with pytest.raises(UnsupportedHostError, match=said):
        logits(quantize_dynamic(model, {nn.Linear}))
    assert torch.equal(logits(model), wanted)
    quantize_dynamic(model, {nn.Linear}, inplace=True)
    with pytest.raises(UnsupportedHostError, match=r"torchao\.quantization\.quantize_\(model"):
        logits(model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:torch.*:DeprecationWarning")
def test_quantization_aware_training_of_torch_is_refused() -> None:
    model = wrapped(vit())
    logits(model)
    host = tokenprune.unwrap(model).train()
    host.blocks[1].mlp.qconfig = get_default_qat_qconfig("fbgemm")
    prepare_qat(host, inplace=True)
    said = r"Module 'blocks\.1\.mlp\.fc1\.\w+' of VisionTransformer was quantized .*prepare_qat"
    for training in (True, False):
        with pytest.raises(UnsupportedHostError, match=said):
            logits(model.train(training))
    with pytest.raises(UnsupportedHostError, match=said):
        wrapped(host)
