"""Methods that fit any host: `tokenprune.wrap(model, tokenprune.methods.ToMe(r=13))`."""

from tokenprune.recipe.methods import (
    DynamicViT,
    EViT,
    KeyNorm,
    Merge,
    MergeFalling,
    Method,
    Random,
    Similarity,
    TokenNorm,
    ToMe,
    TopK,
    list_methods,
    method_named,
    register_method,
)

__all__ = [
    "DynamicViT",
    "EViT",
    "KeyNorm",
    "Merge",
    "MergeFalling",
    "Method",
    "Random",
    "Similarity",
    "ToMe",
    "TokenNorm",
    "TopK",
    "list_methods",
    "method_named",
    "register_method",
]
