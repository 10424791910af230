"""Adapter of transformers' TimeSformer: attention along time needs the grid of each frame."""

from typing import Any

from tokenprune.adapters._corrected import Corrected
from tokenprune.hosts.spec import ArchSpec

__all__ = ["ADAPTER"]


def facts(host: Any, found: ArchSpec) -> dict[str, Any]:
    """Tokens can leave only where space and time are one sequence."""
    joint = host.config.attention_type == "joint_space_time"
    return {"mode": "remove" if joint else "bypass", "num_prefix_tokens": 1}


ADAPTER = Corrected(
    name="transformers/timesformer",
    home="transformers.models.timesformer.modeling_timesformer",
    facts=facts,
)
