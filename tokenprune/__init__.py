"""Learned token pruning for vision transformers that somebody else wrote."""

from tokenprune import errors, losses
from tokenprune.arch import ArchSpec, ExampleInput, list_adapters, register_adapter
from tokenprune.checkpoint import load, save
from tokenprune.convert import convert_dynamicvit, load_dynamicvit
from tokenprune.exporting import ExportReport, export
from tokenprune.image_macs import ImageMacs
from tokenprune.profile import Profile, profile
from tokenprune.pruning_trace import PruningTrace, StageTrace
from tokenprune.recipe import Recipe, list_recipes
from tokenprune.verify import Certificate, verify
from tokenprune.wrap import unwrap, wrap

__all__ = [
    "ArchSpec",
    "Certificate",
    "ExampleInput",
    "ExportReport",
    "ImageMacs",
    "Profile",
    "PruningTrace",
    "Recipe",
    "StageTrace",
    "convert_dynamicvit",
    "errors",
    "export",
    "list_adapters",
    "list_recipes",
    "load",
    "load_dynamicvit",
    "losses",
    "profile",
    "register_adapter",
    "save",
    "unwrap",
    "verify",
    "wrap",
]
