"""Learned token pruning for vision transformers that somebody else wrote."""

from tokenprune.versions import DISTRIBUTION, version_of  # isort: split

from tokenprune import errors, losses, methods
from tokenprune.checkpoints.directory import load, save
from tokenprune.checkpoints.dynamicvit import convert_dynamicvit, load_dynamicvit
from tokenprune.checkpoints.sharing import push_to_hub, save_pretrained
from tokenprune.checks.certificate import Certificate
from tokenprune.checks.verify import verify
from tokenprune.cost.benchmark import Benchmark, benchmark
from tokenprune.cost.image_macs import ImageMacs
from tokenprune.cost.profile import Profile, profile
from tokenprune.exporting import ExportReport, export
from tokenprune.hosts.registry import list_adapters, register_adapter
from tokenprune.hosts.spec import ArchSpec, ExampleInput
from tokenprune.recipe import Recipe, list_recipes
from tokenprune.rewrite.kept.pruning_trace import PruningTrace, StageTrace
from tokenprune.runtime.cache import CacheInfo
from tokenprune.runtime.serving import cache_info, clear_cache, freeze_guards
from tokenprune.tune.calibrate import Calibration, calibrate
from tokenprune.tune.compare import Comparison, compare
from tokenprune.wrapping import unwrap, wrap

__version__ = version_of(DISTRIBUTION) or "unknown"
"""Of the distribution `tokenprune-torch`; unknown in a source tree that was never installed."""

__all__ = [
    "ArchSpec",
    "Benchmark",
    "CacheInfo",
    "Calibration",
    "Certificate",
    "Comparison",
    "ExampleInput",
    "ExportReport",
    "ImageMacs",
    "Profile",
    "PruningTrace",
    "Recipe",
    "StageTrace",
    "benchmark",
    "cache_info",
    "calibrate",
    "clear_cache",
    "compare",
    "convert_dynamicvit",
    "errors",
    "export",
    "freeze_guards",
    "list_adapters",
    "list_recipes",
    "load",
    "load_dynamicvit",
    "losses",
    "methods",
    "profile",
    "push_to_hub",
    "register_adapter",
    "save",
    "save_pretrained",
    "unwrap",
    "verify",
    "wrap",
]
