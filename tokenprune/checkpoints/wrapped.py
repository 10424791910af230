"""How a saved model was wrapped: its adapter, by name or with the facts that its owner stated."""

from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tokenprune.checkpoints.facts import Facts
from tokenprune.errors import CheckpointError
from tokenprune.hosts.registry import list_adapters
from tokenprune.hosts.spec import ArchSpec
from tokenprune.runtime.pruning import Pruning

__all__ = ["stated", "wrap_options"]

SPEC = "spec"
"""Key in `Facts.host`, which older releases only print; they would hand on what is in `wrap`."""


def stated(pruning: Pruning) -> dict[str, Any]:
    """The `ArchSpec` that `wrap` was given, for the facts; empty if it was given none."""
    given = pruning.adapter
    return {SPEC: asdict(given)} if isinstance(given, ArchSpec) else {}


def wrap_options(facts: Facts) -> dict[str, Any]:
    """The options that the saved model was wrapped with; an adapter that is unknown here is not
    asked for.

    Raises:
        CheckpointError: What it says about the host is damaged.
    """
    known = facts.wrap.get("adapter") in list_adapters()
    options = {name: value for name, value in facts.wrap.items() if known or name != "adapter"}
    if SPEC in facts.host:
        try:
            options["adapter"] = TypeAdapter(ArchSpec).validate_python(facts.host[SPEC])
        except ValidationError as error:
            one_line = " ".join(str(error).split())
            raise CheckpointError(
                f"tokenprune.json says about the host what no ArchSpec holds: "
                f"{one_line}. Pass the "
                "facts yourself: tokenprune.load(folder, host, adapter=ArchSpec(...))."
            ) from error
    return options
