"""What a page may use without making it: small hosts and images in place of large ones.

Pages name published models. Here `timm.create_model` and `from_pretrained` build the same classes
small, with random weights, so that a page runs in seconds and without a network.
"""

import sys
from typing import Any

import pytest
import sklearn.datasets
import timm
import torch
import torchvision
import transformers
from sklearn.utils import Bunch
from torch.utils.data import DataLoader, TensorDataset

import tokenprune
from tokenprune.analysis import operators
from tokenprune.losses import ModelLoss
from tokenprune.recipe import methods
from tokenprune.recipe.names import MODES, SCORERS
from tokenprune.rewrite import rules

__all__ = ["namespace", "predictor_gradients", "small_models"]

VIT = {"img_size": 224, "patch_size": 28, "embed_dim": 96, "depth": 4, "num_heads": 3}
CONFIG = {
    "image_size": 224,
    "patch_size": 28,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
TEXTS = {"vocab_size": 99, "max_position_embeddings": 64}
CLASSES = 5
# The modules: tokenprune has functions of these names.
compare = sys.modules["tokenprune.tune.compare"]
benchmark = sys.modules["tokenprune.cost.benchmark"]
ROUNDS = ("ROUNDS", "TURN_SECONDS")


def small_models(patch: pytest.MonkeyPatch) -> None:
    """Let models that a page names be built small, timed in short turns, and tried at one cost."""
    for registry in (SCORERS, MODES, methods._METHODS):  # pages may add to them
        patch.setattr(registry, "_known", dict(registry._known))
    patch.setattr(operators, "_KINDS", dict(operators._KINDS))
    patch.setattr(rules, "_rules", dict(rules._rules))
    for module, rounds, turn in ((compare, "TIMED_ROUNDS", "TURN"), (benchmark, *ROUNDS)):
        patch.setattr(module, rounds, 1)
        patch.setattr(module, turn, 0.001)
    patch.setitem(tokenprune.compare.__kwdefaults__, "macs", (0.65,))
    patch.setitem(tokenprune.compare.__kwdefaults__, "methods", ("merge-k0.7", "evit-k0.7"))
    patch.setitem(tokenprune.calibrate.__kwdefaults__, "trials", 2)
    patch.setitem(tokenprune.benchmark.__kwdefaults__, "batches", (1, 2))
    vit = torchvision.models.VisionTransformer
    patch.setattr(torchvision.models, "vit_b_16", lambda: vit(224, 28, 4, 2, 16, 32).eval())
    digits = sklearn.datasets.load_digits()
    few = Bunch(images=digits.images[:400], target=digits.target[:400])
    patch.setattr(sklearn.datasets, "load_digits", lambda: few)
    create = timm.create_model

    def create_small(name: str, pretrained: bool = False, **options: Any) -> Any:
        if name.startswith("local-dir:"):
            return create(name, pretrained=pretrained, **options)
        assert timm.is_model(name), f"timm has no {name}"
        torch.manual_seed(0)
        if "img_size" in options:  # the page builds it small itself
            return create(name, **options).eval()
        shape = {**VIT, "num_classes": CLASSES, **options}
        return create("vit_tiny_patch16_224", **shape).eval()

    def from_pretrained(cls: Any, name: str, **options: Any) -> Any:
        torch.manual_seed(0)
        return cls(transformers.ViTConfig(**CONFIG, num_labels=CLASSES, **options)).eval()

    def texts(cls: Any, name: str, **options: Any) -> Any:
        torch.manual_seed(0)
        return cls.from_config(transformers.BertConfig(**CONFIG, **TEXTS, **options)).eval()

    patch.setattr(timm, "create_model", create_small)
    for host in (transformers.ViTModel, transformers.ViTForImageClassification):
        patch.setattr(host, "from_pretrained", classmethod(from_pretrained))
    for auto in (transformers.AutoModel, transformers.AutoModelForSequenceClassification):
        patch.setattr(auto, "from_pretrained", classmethod(texts))


def predictor_gradients(patch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows with each gradient of a predictor of a model that `for_model` was given:
    whether it is not zero."""
    found: list[bool] = []
    make = ModelLoss.__init__

    def watched(self: ModelLoss, model: Any, *args: Any, **options: Any) -> None:
        make(self, model, *args, **options)
        for parameter in model.token_predictors.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: found.append(bool(gradient.any())))

    patch.setattr(ModelLoss, "__init__", watched)
    return found


def namespace() -> dict[str, Any]:
    """The names that a page may use at its start."""
    host = timm.create_model("deit_small_patch16_224")
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 224, 224), torch.arange(4) % CLASSES
    clip = transformers.CLIPConfig(
        vision_config={**CONFIG, "projection_dim": 16},
        text_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        projection_dim=16,
    )
    return {
        "batches": [(images, labels)],
        "clip": transformers.CLIPModel(clip).eval(),
        "host": host,
        "images": images,
        "labels": labels,
        "loader": DataLoader(TensorDataset(images, labels), batch_size=2),
        "texts": ["a short text", "another one that is longer"],
        "timm": timm,
        "tokenizer": tokenizer,
        "tokenprune": tokenprune,
        "torch": torch,
        "torchvision": torchvision,
        "transformers": transformers,
    }


def tokenizer(texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
    """Word numbers, padded to the longest text."""
    words = [[len(word) for word in text.split()] * 3 for text in texts]
    longest = max(map(len, words))
    pad = [line + [0] * (longest - len(line)) for line in words]
    mask = [[1] * len(line) + [0] * (longest - len(line)) for line in words]
    return {"input_ids": torch.tensor(pad), "attention_mask": torch.tensor(mask)}
