"""Models without a head: `last_hidden_state` given back in place, or left short, as asked."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenprune
from tests.zoo.hosts import HF
from tests.zoo.rows import randomize_weights
from tests.zoo.sequences import CLIP, DISENTANGLED, SAMPLES, SOUND, SPECIAL, TEXT, sounds, texts

pytestmark = pytest.mark.slow
RECIPE = {"version": 1, "schedule": {"blocks": [1, 2], "keep_ratio": 0.6}}
IMAGES = {**HF, "num_hidden_layers": 3}
MODERN = {**TEXT, **SPECIAL, "local_attention": 8}
HEADLESS: dict[str, dict[str, Any]] = {
    "ViTModel": IMAGES,
    "BeitModel": {**IMAGES, "use_relative_position_bias": True},
    "Dinov2Model": IMAGES,
    "DINOv3ViTModel": {**IMAGES, "num_register_tokens": 4},
    "SiglipVisionModel": IMAGES,
    "VideoMAEModel": CLIP,
    "BertModel": TEXT,
    "ModernBertModel": MODERN,
    "DebertaV2Model": {**TEXT, **DISENTANGLED},
    "Wav2Vec2Model": SOUND,
}


def build(model: str) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, model)
    host = cls(cls.config_class(**HEADLESS[model])).eval()
    randomize_weights(host, 20.0)
    return host


def inputs(host: Any) -> dict[str, Tensor]:
    if host.main_input_name == "input_ids":
        return texts(2, 16, "input_ids")
    if host.main_input_name == "input_values":
        return sounds(2, SAMPLES, "input_values")
    shape = (4, 3, 16, 16) if hasattr(host.config, "num_frames") else (3, 32, 32)
    return {"pixel_values": torch.randn(2, *shape)}


@pytest.mark.parametrize("name", HEADLESS)
def test_tokens_come_back_in_place_or_short(name: str) -> None:
    host = build(name)
    given = inputs(host)
    found, dense = {}, host(**given).last_hidden_state
    for restore in (True, False):
        model = tokenprune.wrap(host, RECIPE, example_inputs=given, restore=restore, train=False)
        if restore:
            predictors = model.token_predictors.state_dict()
        model.token_predictors.load_state_dict(predictors)
        with torch.no_grad():
            output, trace = model(**given, return_trace=True)
        found[restore] = output.last_hidden_state
    prefix = model._pruning.plan.num_prefix
    kept = trace.stages[-1].keep_indices
    assert found[True].shape == dense.shape
    assert found[False].shape[1] == prefix + kept.shape[1] < dense.shape[1]
    rows = torch.cat([torch.arange(prefix).expand(2, -1), kept + prefix], dim=1)
    index = rows.unsqueeze(-1).expand(-1, -1, dense.shape[-1])
    torch.testing.assert_close(found[True].gather(1, index), found[False], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[True], dense, atol=1e-4)
