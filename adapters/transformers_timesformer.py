"""Adapter of transformers' TimeSformer: attention along time needs the grid of each frame."""

from typing import Any

from tokenprune.adapters._corrected import Corrected

__all__ = ["ADAPTERS"]


def facts(host: Any) -> dict[str, Any]:
    """Tokens can be removed only where space and time are one sequence."""
    joint = host.config.attention_type == "joint_space_time"
    return {"mode": "remove" if joint else "bypass", "num_prefix_tokens": 1}


ADAPTERS = (
    Corrected(
        name="transformers/timesformer",
        home="transformers.models.timesformer.modeling_timesformer",
        facts=facts,
    ),
)
