"""The folder of a training run: its description and its whole checkpoints.

A process can be killed while it writes. A checkpoint is whole if it holds the mark, a file that is
written last; the previous checkpoint is kept until then.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from tokenprune.errors import CheckpointError

__all__ = ["KEPT_CHECKPOINTS", "RunFolder", "mark_whole", "newest_checkpoint", "unmark"]

KEPT_CHECKPOINTS = 2
NO_RESUME = "resume=False (--no-resume)"
_MARK = "whole"
_RUN = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def unmark(checkpoint: Path) -> None:
    """Remove the mark before the checkpoint is written."""
    (checkpoint / _MARK).unlink(missing_ok=True)


def mark_whole(checkpoint: Path) -> None:
    """Write the mark after everything else."""
    (checkpoint / _MARK).touch()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, which need not exist; None if there is none."""
    whole = [path for path in _checkpoints(folder) if (path / _MARK).exists()]
    return whole[-1] if whole else None


class RunFolder:
    """Checkpoints and other files that a resumed run needs."""

    def __init__(self, path: Path, processes: Any) -> None:
        """Name a folder, which need not exist; `processes` is accelerate's `PartialState`."""
        self.path, self.processes = path, processes

    def begin(self, description: Mapping[str, Any], resume: bool) -> Path | None:
        """The checkpoint to resume from; None for a fresh start, which deletes existing ones.

        Checkpoints that another program wrote are deleted only without `resume`. The description
        is whatever determines the weights; a resumed run must have the same.

        Raises:
            CheckpointError: the folder holds another run, or checkpoints of another program.
        """
        newest = newest_checkpoint(self.path) if resume else None
        if newest is not None:
            self._check(description)
        elif resume and _checkpoints(self.path) and not (self.path / _RUN).exists():
            raise CheckpointError(
                f"{str(self.path)!r} holds {_checkpoints(self.path)[-1].name}, which another "
                f"program wrote: there is no {_RUN}. Choose another folder; {NO_RESUME} deletes it."
            )
        self.processes.wait_for_everyone()  # every rank has read the folder before it changes
        if newest is None and self.processes.is_main_process:
            self._clear(description)
        self.processes.wait_for_everyone()
        return newest

    def share_weights(self, model: nn.Module, name: str, resumed: bool) -> None:
        """Write weights that no checkpoint holds; read them in a resumed run."""
        file = self.path / name
        if resumed:
            load_model(model, file)
        elif self.processes.is_main_process:
            save_model(model, str(file))

    def _clear(self, description: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        old = _checkpoints(self.path)
        for checkpoint in old:
            unmark(checkpoint)
        for checkpoint in old:
            shutil.rmtree(checkpoint)
        text = json.dumps(description, indent=1, sort_keys=True)
        (self.path / _RUN).write_text(text + "\n", encoding="utf-8")

    def _check(self, description: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{str(self.path)!r} holds checkpoints, but {_RUN} does not say of which run: "
                f"{error}. Choose another folder, or {NO_RESUME} to start again."
            ) from error
        there, now = _flat(found), _flat(json.loads(json.dumps(description)))
        differing = [
            f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(there.keys() | now.keys())
            if there.get(key) != now.get(key)
        ]
        if differing:
            what = f"{str(self.path)!r} holds another run, which cannot be resumed:"
            do = f"\nChoose another folder, or {NO_RESUME} to start again."
            raise CheckpointError("\n  - ".join([what, *differing]) + do)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first, by the step in their names."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps)]


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` to `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
