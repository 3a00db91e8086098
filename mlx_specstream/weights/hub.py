"""Fetching from the Hugging Face hub and uploading to it; every way to fail told in one sentence.

`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and the token of `hf auth login` do what they always
do: the hub's own client reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, OptionError, SpecStreamError, brief, shown

_ID = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")


def pinned(name: str, revision: str | None) -> tuple[str, str | None]:
    """Split `owner/name@revision` into the id and the revision, a branch, tag or commit.

    Raises:
        OptionError: `revision` names another one.
    """
    bare, at, own = name.rpartition("@")
    if not at or not own or not _ID.fullmatch(bare):
        return name, revision
    if revision not in (None, own):
        raise OptionError(f"{name} names the revision {own}, and the option names {revision}.")
    return bare, own


def refuse_revision(name: str, revision: str | None, kind: str) -> None:
    """Refuse a revision of what is not on the hub.

    Raises:
        OptionError: a revision is given.
    """
    if revision is not None:
        raise OptionError(
            f"a revision is for the Hugging Face hub, and {name} is {kind}; leave out {revision!r}."
        )


def fetch(
    name: str,
    what: str,
    error: type[SpecStreamError],
    *,
    patterns: Sequence[str],
    revision: str | None = None,
) -> Path:
    """Return the local folder of the hub's `name`, fetching the files of these patterns if need be.

    Args:
        name: `owner/name`, or `owner/name@revision`.

    Raises:
        SpecStreamError: of the type `error`: no such id, no access, no network, no space.
    """
    from huggingface_hub import snapshot_download

    bare, revision = pinned(name, revision)
    if not _ID.fullmatch(bare):
        raise error(
            f"the path {name} does not exist; name a {what} folder that does, or an id like "
            "owner/name on the Hugging Face hub."
        )
    try:
        return Path(snapshot_download(bare, revision=revision, allow_patterns=list(patterns)))
    except Exception as failure:  # its own, requests', httpx's and the system's errors alike
        raise error(
            f"there is no folder {name!r} here, and {_reason(bare, what, revision, failure)}."
        ) from failure


def tagged(tag: str, limit: int, error: type[SpecStreamError]) -> list[tuple[str, int]]:
    """Return the hub's repositories with a tag and their downloads, the most downloaded first.

    Raises:
        SpecStreamError: of the type `error`: the hub cannot be asked.
    """
    from huggingface_hub import HfApi

    try:
        found = HfApi().list_models(filter=tag, sort="downloads", limit=limit)
        return [(model.id, model.downloads or 0) for model in found]
    except Exception as failure:  # its own, requests', httpx's and the system's errors alike
        raise error(
            f"the Hugging Face hub cannot be searched ({brief(failure)}); check the network and "
            "whether HF_HUB_OFFLINE is set."
        ) from failure


def check_repository(name: str, what: str = "--upload-repo") -> None:
    """Refuse what cannot be the id of a repository, before a long conversion.

    Raises:
        OptionError: not of the form `owner/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OptionError(f"{what} {shown(name)} is no repository: {brief(error)}.") from None


def upload(
    folder: Path,
    repository: str,
    *,
    patterns: Sequence[str] | None = None,
    private: bool | None = None,
) -> None:
    """Upload a finished folder to the hub, or its files of these patterns, making the repository.

    Raises:
        CheckpointError: the hub refuses or cannot be reached; the local folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True, private=private)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="model",
            allow_patterns=None if patterns is None else list(patterns),
        )
    except Exception as error:  # its own, requests', httpx's and the system's errors alike
        again = f"hf upload {repository} {folder}"
        if patterns is not None:
            again = f"specstream upload {folder} {repository}"
        raise CheckpointError(
            f"{folder} is complete but could not be uploaded to {repository} ({brief(error)}); "
            "check the network, 'hf auth login' and your access, then upload the folder again: "
            f"{again}."
        ) from None


def _reason(name: str, what: str, revision: str | None, failure: Exception) -> str:
    """Say why the hub gave nothing, and what to do."""
    from huggingface_hub import constants, errors

    offline = isinstance(failure, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
    if offline and constants.HF_HUB_OFFLINE:
        at = f" at revision {revision}" if revision else ""
        return (
            f"the hub's cache does not hold {name}{at}, while HF_HUB_OFFLINE forbids to fetch it; "
            "fetch it once with HF_HUB_OFFLINE unset, or name a folder"
        )
    if isinstance(failure, errors.GatedRepoError):
        return (
            f"the Hugging Face hub gives {name} only to those who accepted its terms; accept them "
            "on its page, log in with 'hf auth login' and try again"
        )
    if isinstance(failure, errors.RevisionNotFoundError):
        return (
            f"{name} on the Hugging Face hub has no revision {revision!r}; name a branch, a tag "
            "or a commit of it"
        )
    if isinstance(failure, errors.RepositoryNotFoundError):
        return (
            f"no {what} {name!r} on the Hugging Face hub that may be read; check the name, and "
            "log in with 'hf auth login' if it is private"
        )
    return (
        f"no {what} of that name could be fetched from the Hugging Face hub "
        f"({brief(failure)}); check the name and the network"
    )
