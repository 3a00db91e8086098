"""Which folder a name means: of a model, fetched if need be, or of adapters."""

from __future__ import annotations

from pathlib import Path

from ..errors import ModelError
from ..weights.drafter import CONFIG_FILE
from ..weights.hub import fetch, refuse_revision
from .demo import DEMO_NAME, resolve_demo
from .gemma import GEMMA_NAME, resolve_gemma

# What mlx-lm fetches, less Python files, plus the streams.
MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model", "model*.safetensors")
STREAM_FILES = ("streams.safetensors", "drafter.safetensors")


def is_built_in(name: str) -> bool:
    """Tell whether a name is that of a model made from packages of the index, and of no folder here."""
    return name == DEMO_NAME or (name == GEMMA_NAME and not Path(name).exists())


def model_folder(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model: `demo`, a folder here, `gemma3-270m`, or a hub id, fetched if need be.

    Raises:
        ModelError: there is no such model.
        OptionError: a revision of what is not on the hub.
    """
    if name == DEMO_NAME:
        refuse_revision(name, revision, "the demo model")
        return resolve_demo()
    folder = Path(name).expanduser()
    if folder.exists():
        refuse_revision(name, revision, "a path here")
    elif name == GEMMA_NAME:
        refuse_revision(name, revision, "a model of the package index")
        return resolve_gemma()
    else:
        folder = fetch(
            name, "model", ModelError, patterns=(*MODEL_FILES, *STREAM_FILES), revision=revision
        )
    if not folder.is_dir():
        raise ModelError(
            f"{name} is a file, but a model is a folder with config.json and model*.safetensors; "
            "name that folder, or make one with specstream convert."
        )
    if not any((folder / file).is_file() for file in ("config.json", CONFIG_FILE)):
        raise ModelError(
            f"{name} holds no config.json, so it is no model folder; name a folder that mlx-lm "
            "loads, or make one with specstream convert."
        )
    return folder


def adapter_folder(name: str | Path) -> Path:
    """Return the folder of LoRA adapters, made sure to hold them.

    Raises:
        ModelError: there is no such folder, or it holds something else.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(
            f"the adapter folder {name} {kind}; name a folder that mlx_lm.lora wrote, or leave it out."
        )
    for file in ("adapter_config.json", "adapters.safetensors"):
        if not (folder / file).is_file():
            streams = (folder / STREAM_FILES[0]).is_file()
            raise ModelError(
                f"the adapter folder {name} holds no {file}, which mlx_lm.lora writes; "
                + ("it holds streams: name it as such." if streams else "name another folder.")
            )
    return folder
