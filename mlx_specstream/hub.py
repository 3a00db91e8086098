"""Fetching from the Hugging Face hub, with every way it can fail told in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import SpecStreamError


def fetch(
    name: str,
    what: str,
    error: type[SpecStreamError],
    *,
    patterns: Sequence[str],
    revision: str | None = None,
) -> Path:
    """Return the local folder of the hub's `name`, fetching the files of these patterns if need be.

    Raises:
        SpecStreamError: of the type `error`: no such id, no access, no network, no space.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as failure:  # its own, requests', httpx's and the system's errors alike
        raise error(
            f"there is no folder {name!r} here, and no {what} of that name could be fetched from "
            f"the Hugging Face hub ({first_line(failure)}); check the name and the network."
        ) from failure


def first_line(failure: BaseException, limit: int = 200) -> str:
    """Return what an error says in one line without a closing full stop, or its class's name."""
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    said = lines[0] if lines else type(failure).__name__
    return (said if len(said) <= limit else said[: limit - 1] + "…").rstrip(".:")
