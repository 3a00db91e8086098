"""Where a model is: a local path first, else a repository of the hub, fetched by its own client.

Code files are never asked for. `HF_HUB_OFFLINE`, `HF_ENDPOINT` and the client's cache do what they
always do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import CheckpointError, OptionError, shown
from ..loading.folders import is_built_in, model_folder
from ..weights.hub import fetch

_REPOSITORY = re.compile(r"[\w.\-]{1,96}(/[\w.\-]{1,96})?")
_SMALL = ["*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_SAFETENSORS = [*_SMALL, "*.safetensors"]
_OTHERS = [*_SMALL, "*.bin", "*.pt", "*.pth", "*.ckpt"]


def locate(name: str, revision: str | None = None, beside: Path | None = None) -> Path:
    """Return the local folder or file of a model; fetch it from the hub if it is not local.

    Args:
        name: a path, `demo`, `gemma3-270m`, or a repository id as `owner/name`.
        revision: branch, tag or commit on the hub.
        beside: a folder that a relative path may also be relative to.

    Raises:
        CheckpointError: neither a local path nor a repository that can be fetched.
    """
    path = Path(name or "?").expanduser()
    for candidate in (path, *([beside / path] if beside else [])):
        if _exists(candidate):
            if revision:
                raise OptionError(f"--revision is for the hub, and {candidate} is a local path.")
            return candidate
    if is_built_in(name):
        return model_folder(name, revision)
    if not _REPOSITORY.fullmatch(name) or ".." in name:
        raise CheckpointError(
            f"{shown(name)} does not exist; name a folder, a weight file, or a hub repository"
            " owner/name."
        )
    folder = _fetch(name, revision, _SAFETENSORS)
    return folder if any(folder.glob("*.safetensors")) else _fetch(name, revision, _OTHERS)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a NUL: from a config
        return False


def _fetch(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    return fetch(name, "checkpoint", CheckpointError, patterns=patterns, revision=revision)
