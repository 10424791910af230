"""Methods that fit any host: `tokenprune.wrap(model, tokenprune.methods.ToMe(r=13))`."""

from tokenprune.recipe.methods import *  # noqa: F403 - the list of names is there
from tokenprune.recipe.methods import __all__ as __all__
