"""transformers' common tests of models, over the classes of one host: pytest runs this file."""

import importlib
import os
import sys
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import tokenprune
from benchmarks.upstream_parts.hosts import TRANSFORMERS, config_of, recipe_of

HOST, WRAPPED = os.environ["UPSTREAM_HOST"], os.environ["UPSTREAM_WRAPPED"] == "1"
PACKAGE = "transformers_tests"


def common() -> Any:
    """The mixin of the sdist's file; of the modules that the sdist lacks it needs two names."""
    file = Path(os.environ["UPSTREAM_FILE"])
    package = ModuleType(PACKAGE)
    package.__path__ = [str(file.parent)]
    sys.modules[PACKAGE] = package
    for inner, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        for part in (inner.partition(".")[0], inner):
            sys.modules[f"{PACKAGE}.{part}"] = ModuleType(f"{PACKAGE}.{part}")
        setattr(sys.modules[f"{PACKAGE}.{inner}"], name, type(name, (), {}))
    return importlib.import_module(f"{PACKAGE}.{file.stem}")


CONFIG, KINDS, SIZES = config_of(HOST)


class Wrapping(type):
    """Calling a class of this kind gives the wrapped model of what its base would build."""

    def __call__(cls, config: Any, *args: Any, **options: Any) -> Any:
        host = cls.__mro__[1](config, *args, **options)
        size = config.image_size
        device = next(host.parameters()).device
        images = {"pixel_values": torch.zeros(2, 3, size, size, device=device)}
        recipe = recipe_of(TRANSFORMERS[HOST])
        return tokenprune.wrap(host, recipe, example_inputs=images, restore=True, verify=False)


def under_test(kind: type) -> type:
    """A class of the host, or one that builds it wrapped."""
    if not WRAPPED:
        return kind
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return Wrapping(kind.__name__, (kind,), own)


class Tester:
    """What the common tests ask about a host."""

    def __init__(self, parent: Any) -> None:
        self.parent, self.batch_size, self.is_training = parent, 2, True
        self.num_channels, self.num_labels, self.seq_length = 3, 2, 0
        vars(self).update(SIZES)
        patches = (self.image_size // self.patch_size) ** 2
        self.seq_length = patches + 1
        self.num_masks = 0

    def get_config(self) -> Any:
        return CONFIG(**SIZES)

    def prepare_config_and_inputs_for_common(self) -> Any:
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape)}


MIXIN = common().ModelTesterMixin


class Common(MIXIN, unittest.TestCase):  # type: ignore[misc, valid-type]
    all_model_classes = tuple(map(under_test, KINDS))
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = Tester(self)


del MIXIN
