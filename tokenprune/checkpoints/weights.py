"""Tensors of a wrapped model in safetensors files, each once, and back."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenprune.checkpoints.facts import FACTS, Facts, damaged
from tokenprune.errors import CheckpointError
from tokenprune.runtime.added import added_names

__all__ = [
    "is_added",
    "on_their_own",
    "read_files",
    "read_tensors",
    "sha256",
    "shared_names",
]


def is_added(name: str) -> bool:
    """Whether a key of a state dict is of what `wrap` added to the host."""
    return name.startswith(added_names())


def shared_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Name of a shared tensor -> the first name it has.

    Raises:
        CheckpointError: Something is no tensor, or has no data.
    """
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            found = "a tensor without data" if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"Cannot save {name!r}: it is {found}. A checkpoint holds tensors only. Let its "
                "module keep a tensor there (register_buffer), or leave it out of the state dict."
            )
        shared = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and first.setdefault(shared, name) != name:
            aliases[name] = first[shared]
    return aliases


def on_their_own(state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under their first name, in memory of their own."""
    tensors = {}
    for name, value in state.items():
        if name not in aliases:
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            value = value.detach().cpu().contiguous()
            tensors[name] = value if whole else value.clone()
    return tensors


def sha256(file: Path) -> str:
    """The checksum of a file."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_tensors(source: Path, facts: Facts) -> dict[str, Tensor]:
    """All tensors of a saved model, also under the names that share them.

    Raises:
        CheckpointError: A file is damaged, or is not the one that was saved.
    """
    tensors = read_files(source, facts.files)
    for name, known in facts.files.items():
        if sha256(source / name) != known:
            how = f"its checksum is not the one in {FACTS} (a broken copy, a save that was cut off"
            raise damaged(source, name, f"{how}, or the weights of another model)")
    for other, name in facts.aliases.items():  # a library may keep either name
        for there, lacking in ((name, other), (other, name)):
            if there in tensors:
                tensors.setdefault(lacking, tensors[there])
    return tensors


def read_files(source: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of several safetensors files.

    Raises:
        CheckpointError: One cannot be read.
    """
    tensors = {}
    for name in names:
        try:
            with safe_open(source / name, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise damaged(source, name, f"it cannot be read ({error})") from error
    return tensors
