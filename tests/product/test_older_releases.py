"""Folders that older releases saved."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from tokenprune.checkpoints.directory import load
from tokenprune.errors import CheckpointError
from tokenprune.runtime.model import pruning_of

VIT = timm.models.vision_transformer.VisionTransformer
SWIN = timm.models.swin_transformer.SwinTransformer
SAVED_BY_0_1 = {
    "remove": partial(VIT, 16, 4, embed_dim=16, depth=4, num_heads=2, num_classes=5, reg_tokens=1),
    "bypass": partial(
        SWIN, 32, 2, window_size=4, embed_dim=8, depths=(1, 3), num_heads=(2, 2), num_classes=5
    ),
}


@pytest.mark.parametrize("mode", ["remove", "bypass"])
def test_what_release_0_1_saved_gives_the_same_logits(mode: str) -> None:
    """Written at commit ca61f60; `<mode>.safetensors` holds its images, logits and kept sets."""
    saved = Path(__file__).parents[1] / "data" / "saved_by_0.1"
    known = load_file(saved / f"{mode}.safetensors")
    with pytest.raises(CheckpointError, match="an older release saved it"):
        load(saved / mode)
    model = load(saved / mode, SAVED_BY_0_1[mode]()).eval()
    with torch.no_grad():
        logits, trace = model(known["images"], return_trace=True)
    assert torch.equal(trace.stages[-1].keep_indices, known["kept"])
    torch.testing.assert_close(logits, known["logits"])
    assert pruning_of(model).budget.keep_ratios == (0.7, 0.4)
