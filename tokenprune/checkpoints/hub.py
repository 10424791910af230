"""Folders from and to the Hugging Face Hub, by its own client."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenprune.checkpoints.facts import CARD, GENERATED, versions
from tokenprune.errors import CheckpointError, MissingDependencyError

__all__ = ["fetched", "hub_client", "uploaded"]

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
READ = ["*.json", "*.safetensors", "*.yaml", "*.md"]
"""What is fetched: no file with code in it, no pickle."""


def hub_client(what: str) -> Any:
    """huggingface_hub.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs huggingface_hub, which is not installed. "
            "Run: pip install 'tokenprune-torch[hub]'"
        ) from error
    return huggingface_hub


def fetched(
    directory: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder itself if it exists, else the local copy of the repository of that name.

    Raises:
        CheckpointError: There is neither; the Hub's answer is in the message. Or there is a folder,
            and a revision is asked for.
        MissingDependencyError: It is the name of a repository, and huggingface_hub is missing.
    """
    folder = Path(directory)
    if folder.exists() and revision is not None:
        raise CheckpointError(
            f"revision={revision!r} of {str(directory)!r} is asked for, but that is a folder here, "
            "which has none. Leave revision out, or run elsewhere to get the repository of that "
            "name."
        )
    if folder.exists() or not (isinstance(directory, str) and REPOSITORY.fullmatch(directory)):
        return folder
    hub = hub_client(f"There is no folder {directory!r}; to look for it on the Hugging Face Hub")
    try:
        return Path(
            hub.snapshot_download(
                directory,
                revision=revision,
                token=token,
                allow_patterns=READ,
                **_library(),
            )
        )
    except Exception as error:  # the client has many: no such repository, no network, no access
        raise CheckpointError(
            f"There is no folder {directory!r} here, and the Hugging Face Hub gives none of this "
            f"name ({type(error).__name__}: {_first_line(error)}). Check the name; for a private "
            "one pass token=..., without a network name a folder."
        ) from error


def uploaded(
    write: Callable[[Path, str], Any],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    replace_card: bool,
    is_own_card: Callable[[Path], bool],
) -> str:
    """Write a folder and upload it as one commit.

    Args:
        write: Writes into the folder, which has the name of the repository.
        repo_id: `OWNER/NAME`, or a name of one's own; made if it does not exist.
        private: Of a repository that is made; None leaves it to the Hub.
        token: None takes the one of `hf auth login`.
        revision: Branch; made if it does not exist.
        commit_message: None names this library.
        create_pr: As a pull request.
        replace_card: Also where the repository has a model card that its owner edited.
        is_own_card: Whether a card is as this library wrote it; that one is always replaced.

    Returns:
        The address of the commit.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = hub_client("push_to_hub")
    api = hub.HfApi(token=token, **_library())
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    keep_card = not replace_card and api.file_exists(name, CARD, revision=revision)
    with TemporaryDirectory() as folder:
        if keep_card:
            before = Path(folder) / "before"
            there = api.hf_hub_download(name, CARD, revision=revision, local_dir=before)
            keep_card = not is_own_card(Path(there))
        target = Path(folder) / "new" / name.rpartition("/")[2]
        write(target, name)
        done = api.upload_folder(
            repo_id=name,
            folder_path=target,
            revision=revision,
            commit_message=commit_message or "Add a model of tokenprune",
            create_pr=create_pr,
            delete_patterns=GENERATED,
            ignore_patterns=[CARD] if keep_card else None,
        )
    return str(getattr(done, "commit_url", done))


def _library() -> dict[str, str]:
    return {"library_name": "tokenprune", "library_version": versions()["tokenprune"]}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""
