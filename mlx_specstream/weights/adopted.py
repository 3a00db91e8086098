"""Streams that were made here for a user's own models (`specstream adopt`), and how they are found.

    STATE/streams/NAME-PLACE/     streams.safetensors, streams_config.json, acceptance.json, README.md

PLACE stands for the model's folder and mlx-lm's adapters, if there are any. Streams made for that very
model come first; those for the same base, by its fingerprint, serve its other copies and fine-tunes.
Only lossless ones are taken unasked: shared streams change the text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..machine.folders import state_folder
from .checkpoint import CONFIG_FILE
from .fingerprint import same_base


def place_of(model_folder: Path, adapter_path: str | Path | None = None) -> str:
    """Return the name of a model here: of its folder and its adapters', links followed."""
    paths = (model_folder, adapter_path or "")
    text = "\0".join(os.path.realpath(Path(path).expanduser()) if path else "" for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def adopted_folder(name: str, place: str) -> Path:
    """Return where streams for a model are kept; `name` only tells a person whose they are."""
    words = re.sub(r"[^\w.]+", "-", name).strip("-.")[-48:] or "model"
    return state_folder() / "streams" / f"{words}-{place}"


def find_adopted(own: str, place: str | None = None) -> Path | None:
    """Return lossless streams made here for the base with the fingerprint `own`, or None.

    place: of the very model they must be made for; without it the newest for its base.
    """
    found = [
        folder
        for folder, mode, wanted in _kept()
        if mode == "lossless"
        and (place is None or folder.name.endswith(f"-{place}"))
        and not same_base(wanted, own)
    ]
    return max(found, key=lambda folder: (folder / CONFIG_FILE).stat().st_mtime_ns, default=None)


def _kept() -> Iterator[tuple[Path, object, str]]:
    """Yield every folder of streams made here, with its mode and its base's fingerprint."""
    for folder in sorted((state_folder() / "streams").glob("[!.]*")):
        try:
            fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            wanted = fields["base_fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # something else lies there
        if isinstance(wanted, str):
            yield folder, fields.get("mode", "lossless"), wanted
