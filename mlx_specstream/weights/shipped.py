"""Which streams to use: those a person names, made here, in the model's folder, or shipped with us.

streams=None      decode plainly
streams="auto"    made here for this model, else in its folder, else made here for its base, else
                  a shipped set for its base, else none
streams="x"       a folder, the name of a shipped set, or `owner/name[@revision]` on the hub
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.nn as nn

from ..config import AUTO
from ..errors import StreamsError
from ..machine import ranks
from .adopted import find_adopted, place_of
from .checkpoint import CONFIG_FILE, WEIGHTS_FILE, StreamWeights, load_streams
from .files import sketch
from .fingerprint import fingerprint, same_base
from .hub import fetch, refuse_revision

SHIPPED = Path(__file__).parents[1] / "shipped"
STREAM_FILES = (CONFIG_FILE, WEIGHTS_FILE, "acceptance.json")
"""What a folder of streams may hold for decoding; the last is `planner/acceptance.py`'s."""
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+(@\S+)?")


def shipped_names() -> list[str]:
    """Return the names of the stream sets that come with the package."""
    if not SHIPPED.is_dir():
        return []
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / CONFIG_FILE).is_file())


def find_streams(
    streams: str | Path | None,
    model: nn.Module,
    model_folder: Path,
    revision: str | None = None,
    adapter_path: str | None = None,
) -> StreamWeights | None:
    """Load the streams asked for and make sure that they belong to `model`.

    adapter_path: mlx-lm's adapters that `model` was loaded with.

    Raises:
        StreamsError: there are none of that name, they are damaged or of another base.
        OptionError: a revision of what is not on the hub.
    """
    if streams is None or streams == AUTO:
        refuse_revision("--streams", revision, f"{streams or 'none'}")
        if streams is None:
            return None
    if streams == AUTO:
        folder = _automatic(model, model_folder, adapter_path)
    else:
        folder = _named(streams, revision)
    ranks.check_same(
        lambda: b"" if folder is None else sketch(folder, STREAM_FILES),
        "{odd} has other streams than process 0, or none; put the same ones on every machine and "
        "name them with --streams.",
    )
    if folder is None:
        return None
    weights = load_streams(folder)
    weights.check_base(model)
    return weights


def _automatic(model: nn.Module, model_folder: Path, adapter_path: str | None) -> Path | None:
    """Return streams made here for this model, those in its folder, or for the same base.

    Only lossless ones are taken unasked, but from the model's own folder: shared streams change the
    text.
    """
    own = fingerprint(model)
    if made := find_adopted(own, place_of(model_folder, adapter_path)):
        return made
    if any((model_folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return model_folder
    if made := find_adopted(own):
        return made
    for name in shipped_names():
        fields = json.loads((SHIPPED / name / CONFIG_FILE).read_text(encoding="utf-8"))
        wanted = fields.get("base_fingerprint")
        if wanted and fields.get("mode", "lossless") == "lossless" and not same_base(wanted, own):
            return SHIPPED / name
    return None


def shipped_for(task: str, model: nn.Module) -> StreamWeights | None:
    """Return the shipped set made for a kind of text, as `demo-sql` is for `sql`, if it fits the model."""
    for name in shipped_names():
        if name.rpartition("-")[2] == task.lower():
            weights = load_streams(SHIPPED / name)
            try:
                weights.check_base(model)
            except StreamsError:
                continue
            return weights
    return None


def _named(streams: str | Path, revision: str | None) -> Path:
    """Return the folder of a name: a folder here, a shipped set, or fetched from the hub."""
    folder = Path(streams).expanduser()
    if folder.is_dir():
        refuse_revision(str(streams), revision, "a folder here")
        return folder
    if str(streams) in shipped_names():
        refuse_revision(str(streams), revision, "a set shipped with mlx-specstream")
        return SHIPPED / str(streams)
    known = ", ".join(shipped_names()) or "none yet"
    if folder.exists():
        raise StreamsError(
            f"{folder} is a file, but streams are a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "name that folder."
        )
    if not _HUB_ID.fullmatch(str(streams)):
        raise StreamsError(
            f"there are no streams {str(streams)!r}: neither a folder here nor one of the shipped "
            f"sets ({known}) nor an id like owner/name on the Hugging Face hub."
        )
    return fetch(str(streams), "streams", StreamsError, patterns=STREAM_FILES, revision=revision)
