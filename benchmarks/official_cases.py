"""Run the public DynamicViT code with random weights, and save its outputs.

    git clone https://github.com/raoyongming/DynamicViT       # 1322e626
    git clone https://github.com/zihangJiang/TokenLabeling    # 9dbfd59a
    python -m benchmarks.official_cases DynamicViT TokenLabeling cases
    python -m benchmarks.fidelity --cases cases

None of that code is part of this repository; it is imported from the two folders, unchanged. Each
file written is a release file (weights under `model`, the base ratio under `args`) with a `case`:
images, eval logits, kept tokens of each stage in original numbers, smallest gap at a cut.

Weights are far from fresh ones, so that errors show: sharp attention, uneven norms, distant scores.
Of up to 60 random inputs, the first is taken in which the last kept and the first dropped
token differ by more than 1e-3 in log-probability: rounding cannot swap them.
"""

import argparse
import contextlib
import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["main"]

RATIO, MARGIN, DRAWS = 0.7, 1e-3, 60
DEIT = {"patch_size": 16, "depth": 12, "mlp_ratio": 4, "qkv_bias": True, "pruning_loc": [3, 6, 9]}
LVVIT = {"patch_size": 16, "mlp_ratio": 3.0, "p_emb": "4_2", "skip_lam": 2.0}
LVVIT |= {"return_dense": True, "mix_token": True}
SWIN = {"window_size": 7, "drop_rate": 0.0}


@dataclass(frozen=True)
class Model:
    """One of the authors' models.

    Attributes:
        module: Their module.
        name: Class in it.
        options: Sizes.
        swin: Whether the stages see the whole grid, and the ratio falls by 0.2 a stage.
    """

    module: str
    name: str
    options: dict[str, Any]
    swin: bool = False

    @property
    def ratios(self) -> list[float]:
        """The authors' expressions, because int() of a product depends on its rounding error."""
        return [RATIO, RATIO - 0.2, RATIO - 0.4] if self.swin else [RATIO, RATIO**2, RATIO**3]


def _deit(width: int, heads: int) -> Model:
    options = {**DEIT, "embed_dim": width, "num_heads": heads}
    return Model("models.dyvit", "VisionTransformerDiffPruning", options)


def _lvvit(width: int, depth: int, heads: int, stages: list[int]) -> Model:
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "pruning_loc": stages}
    return Model("models.dylvvit", "LVViTDiffPruning", {**LVVIT, **sizes})


def _swin(width: int, depth: int, heads: int, stages: list[int]) -> Model:
    sizes = {"embed_dim": width, "depths": [2, 2, depth, 2], "pruning_loc": stages}
    sizes["num_heads"] = [heads, 2 * heads, 4 * heads, 8 * heads]
    return Model("models.dyswin", "AdaSwinTransformer", {**SWIN, **sizes}, swin=True)


MODELS = {
    "deit-256": _deit(256, 4),
    "deit-small": _deit(384, 6),
    "deit-base": _deit(768, 12),
    "lvvit-s": _lvvit(384, 16, 6, [4, 8, 12]),
    "lvvit-m": _lvvit(512, 20, 8, [5, 10, 15]),
    "swin-tiny": _swin(96, 6, 3, [1, 2, 3]),
    "swin-small": _swin(96, 18, 3, [2, 4, 6]),
    "swin-base": _swin(128, 18, 4, [2, 4, 6]),
}


def _importable(*folders: Path) -> None:
    """Provide what the code of 2023 imports: torch._six, and tensorboardX if not installed."""
    warnings.filterwarnings("ignore")
    six = types.ModuleType("torch._six")
    six.inf = math.inf  # type: ignore[attr-defined]
    board = types.ModuleType("tensorboardX")
    board.SummaryWriter = object  # type: ignore[attr-defined]
    sys.modules.setdefault("torch._six", six)
    sys.modules.setdefault("tensorboardX", board)
    sys.path[:0] = [str(folder.resolve()) for folder in folders]


def build(model: Model) -> nn.Module:
    """One of their models, in eval mode; its printed output is suppressed."""
    cls = getattr(__import__(model.module, fromlist=[model.name]), model.name)
    key = "sparse_ratio" if model.swin else "token_ratio"
    with contextlib.redirect_stdout(io.StringIO()):
        built: nn.Module = cls(**model.options, **{key: model.ratios})
    return built.eval()


def randomize(model: nn.Module, seed: int) -> None:
    """Draw random weights, then centre the predictors: keep and drop equally likely."""
    generator = torch.Generator().manual_seed(seed)
    normed = (nn.LayerNorm, nn.BatchNorm2d)
    norms = {name for name, module in model.named_modules() if isinstance(module, normed)}

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * std

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if owner in norms:
                parameter.copy_((leaf == "weight") + normal(parameter, 0.25))
            elif leaf == "bias":
                parameter.copy_(normal(parameter, 0.2))
            elif parameter.ndim == 1 or name in ("pos_embed", "cls_token") or "bias_table" in name:
                parameter.copy_(normal(parameter, 0.7))
            else:
                gain = _gain(name) / math.sqrt(parameter[0].numel())
                parameter.copy_(normal(parameter, gain))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(normal(buffer, 0.2))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        with _hooked(model, "out_conv.4", _centre):
            model(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(7)))


def _gain(name: str) -> float:
    if "qkv" in name:
        return 2.0
    if "score_predictor" in name:
        return 2.0 if "out_conv.4" in name else 1.6
    return math.sqrt(2) if any(part in name for part in ("conv", "fc", "reduction")) else 1.0


def _centre(layer: nn.Linear, out: Tensor) -> Tensor:
    half = (out[..., 0] - out[..., 1]).mean() / 2
    shift = torch.stack([-half, half])
    layer.bias.add_(shift)
    return out + shift


@contextlib.contextmanager
def _hooked(
    model: nn.Module, layer: str, hook: Callable[[Any, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook` on the output of that layer of each predictor."""
    handles = [
        module.register_forward_hook(lambda module, _, out: hook(module, out))
        for name, module in model.named_modules()
        if "score_predictor" in name and name.endswith(layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def answer(model: nn.Module, of: Model, images: Tensor) -> dict[str, Any]:
    """Eval logits, kept tokens of each stage, and the smallest score gap at a cut."""
    seen: list[Tensor] = []
    with torch.no_grad(), _hooked(model, "out_conv", lambda _, out: seen.append(out[..., 0])):
        logits = model(images)
    kept: list[Tensor] = []
    gaps: list[Tensor] = []
    present: Tensor | None = None  # original numbers of the remaining tokens, by score
    for ratio, score in zip(of.ratios, seen, strict=True):
        count = int(196 * ratio)
        ranked, order = score.sort(dim=1, descending=True)
        gaps.append((ranked[:, count - 1] - ranked[:, count]).min())
        chosen = order[:, :count]
        present = chosen if present is None or of.swin else present.gather(1, chosen)
        kept.append(present.sort(1).values)
    return {
        "images": images,
        "logits": logits,
        "keep_indices": kept,
        "margin": float(min(gaps)),
    }


def main() -> None:
    """Write the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dynamicvit", type=Path, help="folder of their code")
    parser.add_argument("tokenlabeling", type=Path, help="folder of LV-ViT's code")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    _importable(options.dynamicvit, options.tokenlabeling)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        torch.manual_seed(0)
        model = build(MODELS[name])
        randomize(model, 0)
        for batch in (1, 3):  # their Swin fails at batch size 2
            case: dict[str, Any] = {"margin": 0.0}
            for seed in range(100 * batch, 100 * batch + DRAWS):
                generator = torch.Generator().manual_seed(seed)
                images = torch.randn(batch, 3, 224, 224, generator=generator)
                tried = answer(model, MODELS[name], images)
                if tried["margin"] > case["margin"]:
                    case = tried
                if case["margin"] > MARGIN:
                    break
            kept = [indices.shape[1] for indices in case["keep_indices"]]
            print(f"{name} batch {batch}: kept {kept}, margin {case['margin']:.1e}", flush=True)
            content = {"model": model.state_dict(), "args": argparse.Namespace(base_rate=RATIO)}
            torch.save({**content, "case": case}, options.out / f"{name}-b{batch}.pt")


if __name__ == "__main__":
    main()
