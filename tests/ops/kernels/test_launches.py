"""How many kernels a stage launches, counted as operators that make a new tensor."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune

MORE = {
    "tokenprune::keep_best": 1,
    "tokenprune::predictor": 5,
}  # kernels of an operator beyond its first
NONE = {"aten::promote_types"}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        made = result if isinstance(result, list | tuple) else [result]
        new = any(
            isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in held for x in made
        )
        name = func.name().partition(".")[0]
        if name not in NONE and "empty" not in name and (new or func._schema.is_mutable):
            self.names[name] += 1 + MORE.get(name, 0)
        return result


def launched(
    device: torch.device, blocks: list[int], mode: str = "remove", jagged: bool = False
) -> Counter[str]:
    torch.manual_seed(0)
    host = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=4
    )
    recipe = {"version": 1, "mode": mode, "schedule": {"blocks": blocks, "keep_ratio": 0.7}}
    model: Any = tokenprune.wrap(host.to(device).eval(), recipe, verify=False, train=False)
    tokenprune.freeze_guards(model)
    images = torch.randn(4, 3, 32, 32, device=device)
    with torch.no_grad():
        if jagged:
            spread_counts(model, images)
        with Launches() as launches:
            model(images)
    return launches.names


def spread_counts(model: Any, images: Tensor) -> None:
    """Let images keep different numbers of tokens, at each stage."""
    for number, predictor in enumerate(model.token_predictors):
        for weight in predictor.parameters():
            torch.nn.init.normal_(weight, 0, 0.5)
        _, trace = model(images, return_trace=True)
        scores = trace.stages[number].keep_logits
        there = scores[..., 0] > -torch.inf
        odds = (scores[..., 0] - scores[..., 1])[there]
        predictor.out_proj[-1].bias[0] -= odds.median() + 1e-6
        model.set_threshold(0.5)


def test_a_stage_launches_eight_kernels(device: torch.device) -> None:
    more = launched(device, [1, 2]) - launched(device, [1])
    assert dict(more) == {"tokenprune::predictor": 6, "tokenprune::keep_best": 2}


def test_a_stage_of_images_that_keep_different_numbers_launches_nine_kernels(
    device: torch.device,
) -> None:
    found = launched(device, [1, 2], jagged=True)
    ours = {name: count for name, count in found.items() if name.startswith("tokenprune")}
    assert ours == {
        "tokenprune::predictor": 12,
        "tokenprune::keep_above": 2,
        "tokenprune::place_rows": 2,
        "tokenprune::take_rows": 2,
    }


def test_a_stage_that_merges_launches_twelve_kernels_at_most(device: torch.device) -> None:
    more = launched(device, [1, 2], "merge") - launched(device, [1], "merge")
    assert 0 < more.total() <= 12, more
    assert more["tokenprune::join_pairs"] == more["tokenprune::join_tokens"] == 1
