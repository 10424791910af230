"""`save_pretrained` and `push_to_hub` of a wrapped model: all of it, with certificate and card."""

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokenprune.checkpoints.card import is_generated, write_card
from tokenprune.checkpoints.directory import write_folder
from tokenprune.checkpoints.facts import CARD, CERTIFICATE, Facts
from tokenprune.checkpoints.hub import uploaded
from tokenprune.checks.certificate import Certificate
from tokenprune.checks.verify import verify
from tokenprune.errors import HostError
from tokenprune.runtime.model import pruning_of

__all__ = ["push_to_hub", "save_pretrained"]

BY_TRAINERS = ("state_dict", "is_main_process")
AS_IN_MEMORY = "save_original_format"
"""An option of transformers: False leaves names as the module has them. Its Trainer resumes by
`load_state_dict`, which knows no others."""
OF_UPLOADS = ("private", "token", "revision", "commit_message", "create_pr")


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    card: bool | Mapping[str, Any] | None = None,
    images: Tensor | None = None,
    certify: bool | None = None,
    host: Mapping[str, Any] | None = None,
    name: str | None = None,
    **options: Any,
) -> Path:
    """Write a wrapped model to a folder that others read: what `tokenprune.save` writes, a
    certificate and a model card.

    Where the host has a `save_pretrained` of its own, that writes the host, with `options`. A call
    with `state_dict` or `is_main_process` is a trainer's: `transformers.Trainer` resumes from
    `model.safetensors`, so predictors are in it too, and nothing is proven or drawn.

    Args:
        model: What `wrap` returned.
        save_directory: Made if it does not exist; replaced as `tokenprune.save` does.
        card: Whether to write `README.md`; a mapping adds to the Hub's metadata, such as
            `{"license": "apache-2.0"}`. None writes one unless there is one that was edited.
        images: [B, C, height, width] as the model takes them, for a picture in the card.
        certify: Run `verify` on the model as it is, and write what it measured.
        host: As for `tokenprune.save`.
        name: What the card calls it: a repository; the folder if None.
        options: Of the host's own `save_pretrained`, such as `max_shard_size`. With
            `push_to_hub=True`, those of `push_to_hub` too, and `repo_id`.

    Returns:
        The folder.

    Raises:
        NotWrappedError: `model` is not wrapped.
        VerificationError: It does not hold what it should; nothing is written.
        CheckpointError: As `tokenprune.save`.
        HostError: The host has no `save_pretrained`, so it takes none of these options.
        MissingDependencyError: huggingface_hub is not installed, which cards need.
    """
    pruning, target = pruning_of(model), Path(save_directory)
    if options.get("is_main_process") is False:
        return target
    if options.pop("push_to_hub", False):
        upload = {key: options.pop(key) for key in OF_UPLOADS if key in options}
        repo_id = options.pop("repo_id", target.name)
        own: dict[str, Any] = {"card": card, "images": images, "certify": certify, "host": host}
        push_to_hub(model, repo_id, **own, **upload, **options)
    light = not options.keys().isdisjoint(BY_TRAINERS)
    own_way = getattr(type(pruning.host), "save_pretrained", None)
    given = options.pop("state_dict", None)
    state = model.state_dict() if given is None else given
    if own_way is None:
        options.pop("is_main_process", None)
        if options:
            raise HostError(
                f"save_pretrained got {', '.join(sorted(options))}, for the host's own method, "
                f"which a {type(pruning.host).__name__} does not have. Leave it out: "
                "model.save_pretrained(folder)."
            )
        write_host = None
    else:
        if light:
            options |= {"state_dict": state}
        if light and AS_IN_MEMORY in inspect.signature(own_way).parameters:
            options.setdefault(AS_IN_MEMORY, False)
        write_host = partial(own_way, pruning.host, **options)
    certificate = verify(model) if (not light if certify is None else certify) else None
    edited = (target / CARD).exists() and not is_generated(target / CARD)
    wanted = not light and not edited if card is None else card is not False

    def beside(folder: Path, facts: Facts) -> None:
        if certificate is not None:
            _write_certificate(certificate, folder)
        if wanted:
            write_card(
                *(model, folder, facts),
                name=str(save_directory) if name is None else name,
                local=name is None,
                certificate=certificate,
                images=images,
                metadata=card if isinstance(card, Mapping) else None,
            )

    return write_folder(model, target, host=host, state=state, write_host=write_host, beside=beside)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    card: bool | Mapping[str, Any] | None = None,
    **saving: Any,
) -> str:
    """Upload a wrapped model to the Hugging Face Hub: the folder that `save_pretrained` writes.

    Args:
        model: What `wrap` returned.
        repo_id: `OWNER/NAME`, or a name of one's own; made if it does not exist.
        private: Of a repository that is made; None leaves it to the Hub.
        token: None takes the one of `hf auth login`.
        revision: Branch; made if it does not exist.
        commit_message: None names this library.
        create_pr: As a pull request.
        card: As for `save_pretrained`. None keeps the card of a repository that somebody edited.
        saving: Passed to `save_pretrained`.

    Returns:
        The address of the commit.

    Raises:
        NotWrappedError: `model` is not wrapped.
        MissingDependencyError: huggingface_hub is not installed.
        VerificationError: It does not hold what it should; nothing is uploaded.

    Example:
        >>> model.push_to_hub("me/deit-pruned", card={"license": "apache-2.0"})
        >>> model = tokenprune.load("me/deit-pruned")
    """
    pruning_of(model)

    def write(folder: Path, name: str) -> None:
        save_pretrained(model, folder, card=card, **{"name": name, **saving})

    return uploaded(
        write,
        repo_id,
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
        replace_card=card is not None and card is not False,
        is_own_card=is_generated,
    )


def _write_certificate(certificate: Certificate, folder: Path) -> None:
    text = json.dumps(asdict(certificate), indent=2)
    (folder / CERTIFICATE).write_text(text + "\n", encoding="utf-8")
