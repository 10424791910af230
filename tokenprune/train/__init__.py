"""Training on `transformers.Trainer`: hosts, images, the pruning trainer, dense pre-training.

Everything here needs the extra `train`; each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokenprune.errors import MissingDependencyError

if TYPE_CHECKING:
    from tokenprune.hosts.build import build_host, input_settings
    from tokenprune.train.data import DataBundle, load_data
    from tokenprune.train.evaluation import evaluate, kept_tokens
    from tokenprune.train.fitting import FitResult, fit
    from tokenprune.train.folders import DataError
    from tokenprune.train.pretraining import pretrain
    from tokenprune.train.trainer import PruningTrainer

__all__ = [
    "DataBundle",
    "DataError",
    "FitResult",
    "PruningTrainer",
    "build_host",
    "evaluate",
    "fit",
    "input_settings",
    "kept_tokens",
    "load_data",
    "pretrain",
]

_NAMES = {
    "tokenprune.hosts.build": ("build_host", "input_settings"),
    "tokenprune.train.data": ("DataBundle", "load_data"),
    "tokenprune.train.evaluation": ("evaluate", "kept_tokens"),
    "tokenprune.train.fitting": ("FitResult", "fit"),
    "tokenprune.train.folders": ("DataError",),
    "tokenprune.train.pretraining": ("pretrain",),
    "tokenprune.train.trainer": ("PruningTrainer",),
}
_EXTRA_PACKAGES = {"PIL", "accelerate", "sklearn", "timm", "torchvision", "transformers"}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _NAMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA_PACKAGES:
            raise
        raise MissingDependencyError(
            f"tokenprune.train.{name} needs {missing}, which is not installed. "
            "Run: pip install 'tokenprune-torch[train]'"
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
