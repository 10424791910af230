"""One line of the atlas: the results of one model."""

import json
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CERTIFIED", "REFUSED", "Row", "plain"]

CERTIFIED, REFUSED = "certified", "refused"
LONGEST_REASON = 600


@dataclass
class Row:
    """One model.

    Attributes:
        library: `timm` or `transformers`.
        model: Name in timm's registry, or the class in transformers.
        module: Module of the library that defines it.
        kind: Class of the host.
        parameters: Millions of parameters at full size.
        adapter: Name of the adapter that described it.
        mode: `remove` or `bypass`.
        tokens: N, patch tokens at the stages, at full size.
        prefix: P.
        blocks: Number of blocks.
        stages: The block after each stage.
        status: `certified` or `refused`.
        reason: Why it is refused; empty if it is not.
        certificate: `max_error` (largest difference of mask and gather path, relative to the
            output's scale), `precision` it was measured in, `keep_one_exact` (with every token kept
            the output is the host's, bit for bit).
        certified_at: `full`, or the changes of the smaller build.
        gmacs_dense: 10^9 MACs of the host at full size, one image.
        gmacs_pruned: The same with the default recipe, at keep ratio 0.7.
        wrap_seconds: CPU seconds of one thread for tracing and analysis at full size.
        seconds: The same for the whole row, with building and verification.
    """

    library: str
    model: str
    module: str
    kind: str = ""
    parameters: float | None = None
    adapter: str | None = None
    mode: str | None = None
    tokens: int | None = None
    prefix: int | None = None
    blocks: int | None = None
    stages: list[int] = field(default_factory=list)
    status: str = REFUSED
    reason: str = ""
    certificate: dict[str, Any] | None = None
    certified_at: str | None = None
    gmacs_dense: float | None = None
    gmacs_pruned: float | None = None
    wrap_seconds: float | None = None
    seconds: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Identifies a row."""
        return self.library, self.model

    @property
    def certified(self) -> bool:
        """Whether it was wrapped and verified."""
        return self.status == CERTIFIED

    def refuse(self, reason: str) -> None:
        """Set the reason, and delete the result of an unfinished verification."""
        self.status, self.reason = REFUSED, plain(reason)
        self.certificate = self.certified_at = None

    def to_json(self) -> str:
        """One line of JSON; `kind` is called `class` there."""
        held = asdict(self)
        held["class"] = held.pop("kind")
        return json.dumps(held)

    @classmethod
    def from_json(cls, text: str) -> "Row":
        """Read what `to_json` wrote."""
        held = json.loads(text)
        held["kind"] = held.pop("class")
        return cls(**held)


def plain(reason: str) -> str:
    """A reason on one line, without this machine's paths."""
    reason = re.sub(r"[^\s('\"]*/(?:site-packages|dist-packages)/", "", reason)
    reason = re.sub(r"[^\s('\"]*/(?=(?:tokenprune|benchmarks|adapters)/)", "", reason)
    for folder in filter(None, sys.path):  # where a library was installed for a benchmark
        reason = reason.replace(f"{folder}/", "")
    reason = " ".join(reason.split())
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 3] + "..."
