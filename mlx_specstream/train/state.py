"""The state of a run in one file: written under another name and renamed, so it is whole or old.

    training_state.safetensors
      weights/NAME                      stream weights, float32
      best/NAME                         those of the best validation, if a run may stop early
      optimizer/GROUP/NAME/m|v          AdamW's moments
      metadata: where the run stands, its options, the digest of its data

A run that is killed at any moment continues from the last such file and ends with the very
weights of an unbroken run: everything random is a function of the seed and the step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..errors import OptionError, OutputError
from ..weights.files import atomic_file
from .loss import Tensors
from .progress import Progress

STATE_FILE = "training_state.safetensors"


@dataclass(frozen=True)
class SavedState:
    """What the file holds."""

    weights: Tensors
    best: Tensors
    optimizer: Tensors
    progress: Progress
    options: dict[str, Any]
    data_digest: str


def save_state(folder: Path, state: SavedState) -> None:
    """Replace the folder's state file.

    Raises:
        OutputError: it cannot be written; the old one is still there.
    """
    parts = (("weights", state.weights), ("best", state.best), ("optimizer", state.optimizer))
    arrays = {f"{part}/{name}": t for part, table in parts for name, t in table.items()}
    told = {
        "progress": asdict(state.progress),
        "options": state.options,
        "data_digest": state.data_digest,
    }
    with atomic_file(folder / STATE_FILE, if_exists="replace") as path:
        mx.save_safetensors(str(path), arrays, metadata={"state": json.dumps(told)})


def load_state(folder: Path) -> SavedState | None:
    """Return the state of an unfinished run, or None.

    Raises:
        OutputError: the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        loaded = mx.load(str(path), return_metadata=True)
        arrays, metadata = cast(tuple[Tensors, dict[str, str]], loaded)
        told = json.loads(metadata["state"])
        tables: dict[str, Tensors] = {"weights": {}, "best": {}, "optimizer": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition("/")
            tables[part][rest] = array
        mx.eval(tables)
        progress = Progress(**told["progress"])
        return SavedState(**tables, progress=progress, options=told["options"],
                          data_digest=told["data_digest"])  # fmt: skip
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"{path} is damaged and the run cannot be resumed; remove the file and start again, "
            "with --resume-adapter-file if the folder holds streams."
        ) from error


def resumable(folder: Path, resume: bool) -> SavedState | None:
    """Return the state to continue from, if the folder holds one and that is wanted.

    Raises:
        OptionError: the folder holds an unfinished or a finished run, and `resume` is false.
    """
    saved = load_state(folder)
    if resume:
        return saved
    if saved is not None:
        raise OptionError(
            f"{folder} holds a run stopped after {saved.progress.update} updates; add --resume to "
            "continue it, or name another --adapter-path."
        )
    if folder.exists() and any(folder.iterdir()):
        raise OptionError(
            f"{folder} is not empty and is left as it is; name another --adapter-path."
        )
    return None
