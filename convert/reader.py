"""What people have, opened: folders and files of every layout, as tensors by name.

    config.json                        the base model
    model.safetensors                  its weights: one file, or shards with an index;
    pytorch_model.bin, *.pt, *.ckpt      or torch.save's files; or a *.gguf, which carries all three
    speculative_streaming.json         the streams (docs/checkpoint-format.md)
    stream_model.*, conditioner.*      their tensors, unless they are in the files above
    adapter_config.json, adapter_model.*    a PEFT adapter

Nothing is loaded here and nothing is trusted: names in an index must be plain file names, links
must stay inside the folder, the containers are checked by their readers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, brief, shown
from ..weights.tensorfile import TensorFile, open_file, open_tensors, parse_json, read_file
from .tensors import Tensor
from .torchfile import read_torch_file

MAX_JSON_BYTES = 64 << 20
CONFIG, STREAMS, ADAPTER = "config.json", "speculative_streaming.json", "adapter_config.json"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
ADAPTER_WEIGHTS = "adapter_model"
_SIDE_FILES = ("stream_model", "conditioner", ADAPTER_WEIGHTS)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILE_NAME = re.compile(r"[\w.\- ]{1,200}")
_NOT_WEIGHTS = (
    "training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler", "sampler",
    "streams", "consolidated",
)  # fmt: skip
_SHARDED = (
    "a part of a sharded checkpoint: join its parts with "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
)
_UNREAD = {
    "*.distcp": _SHARDED,
    "*/*.distcp": _SHARDED,
    "*/*_model_states.pt": "DeepSpeed's: join its parts with the zero_to_fp32.py beside it",
    "*.msgpack": "Flax's: save it with PyTorch",
    "*.h5": "TensorFlow's: save it with PyTorch",
    "*.nemo": "NeMo's: export it to Hugging Face's form",
}
"""Files of other writers, and how they become what is read."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `tensors` are those of the weight files, `side` those of the stream and adapter files. `files`
    are tokenizer files: name -> path to copy, or the text itself (GGUF).
    """

    path: Path
    tensors: dict[str, Tensor]
    side: dict[str, Tensor]
    config: dict[str, Any] | None = None
    stream_fields: dict[str, Any] | None = None
    adapter_fields: dict[str, Any] | None = None
    files: dict[str, Path | str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder that the checkpoint is in or is."""
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder, or a single weight file with its configs beside it.

    Raises:
        CheckpointError: nothing to read, damaged, unsafe, or a tensor that comes twice.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; name a folder or a weight file.")
    folder = path if path.is_dir() else path.parent
    gguf = path if path.suffix == ".gguf" else _only_gguf(path) if path.is_dir() else None
    if gguf is not None:
        return _open_gguf(gguf, path, read_json(folder / STREAMS, optional=True))
    weights = _weight_files(path) if path.is_dir() else [path]
    side = [each for each in _side_files(folder) if each not in weights]
    files = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    for file in (*weights, *side, *files.values()):
        _check_inside(file, folder)
    return Checkpoint(
        path=path,
        tensors=_all_tensors(weights),
        side=_side_tensors(side),
        config=read_json(folder / CONFIG, optional=True),
        stream_fields=read_json(folder / STREAMS, optional=True),
        adapter_fields=read_json(folder / ADAPTER, optional=True),
        files=dict(files),
    )


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any] | None:
    """Read a JSON object; None if it is missing and `optional`.

    Raises:
        CheckpointError: missing, too large, no file, a link out of its folder, or no JSON object.
    """
    if optional and not path.exists():
        return None
    _check_inside(path, path.parent)
    try:
        value = parse_json(read_file(path, MAX_JSON_BYTES, CheckpointError))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({brief(error)}); get the file again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object; get the file again.")
    return value


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one safetensors or torch file by name; what it is, its bytes say."""
    with open_file(path, CheckpointError) as file:
        head = file.read(9)
    if path.suffix != ".safetensors" and head[8:9] != b"{":
        return read_torch_file(path)
    opened = open_tensors(path, CheckpointError)
    return {name: _of_safetensors(opened, name) for name in opened.entries}


def _of_safetensors(file: TensorFile, name: str) -> Tensor:
    entry = file.entries[name]
    read = lambda: file.read(name)  # noqa: E731
    return Tensor.in_file(name, entry.dtype, entry.shape, file.path, read, entry.start)


def _weight_files(folder: Path) -> list[Path]:
    """Return a folder's weight files: those of an index, else safetensors, else torch's."""
    for name in _INDEXES:
        index = read_json(folder / name, optional=True)
        if index is not None:
            return _indexed(folder, name, index)
    for suffixes in (SUFFIXES[:1], SUFFIXES[1:]):
        found = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix in suffixes
            and path.is_file()
            and path.stem not in _SIDE_FILES
            and not path.stem.startswith(_NOT_WEIGHTS)
        ]
        if found:
            return found
    return []


def _indexed(folder: Path, name: str, index: dict[str, Any]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / name} has no weight_map; get the file again.")
    names = set()
    for file in weight_map.values():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or not file.strip("."):
            raise CheckpointError(
                f"{folder / name} points to {shown(file)}, which is not a file of its own folder."
            )
        names.add(file)
    paths = [folder / file for file in sorted(names)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{folder / name} names {path.name}, which is missing; get it.")
        _check_inside(path, folder)
    tensors = _all_tensors(paths)
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors[tensor].sources[0][0].name != file:
            raise CheckpointError(
                f"{folder / file} does not hold {shown(tensor)}, though {name} says so."
            )
    return paths


def _side_files(folder: Path) -> list[Path]:
    """Return the stream and adapter files; of the same stem, safetensors win."""
    found = []
    for stem in _SIDE_FILES:
        paths = [folder / (stem + suffix) for suffix in SUFFIXES]
        found.extend([path for path in paths if path.is_file()][:1])
    return found


def _all_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_weight_file(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"the tensor {shown(name)} is in both {tensors[name].sources[0][0]} and {path}; "
                    "remove one of the files."
                )
            tensors[name] = tensor
    return tensors


def _side_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """Read the side files; bare names in a conditioner file get their prefix."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_weight_file(path).items():
            full = f"conditioner.{name}" if path.stem == "conditioner" else name
            full = full.replace("conditioner.conditioner.", "conditioner.")
            if full in tensors:
                raise CheckpointError(f"the tensor {shown(full)} is in two files; {path} is one.")
            tensors[full] = tensor.renamed(full)
    return tensors


def _check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leaves its folder; a hub cache's links into its own blobs are fine."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent
    if not path.resolve().is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link that leaves its folder; put the file itself there."
        )


def _only_gguf(folder: Path) -> Path | None:
    """Return the folder's GGUF file if it has one and no other weights."""
    found = sorted(folder.glob("*.gguf"))
    if not found or _weight_files(folder) or any((folder / name).exists() for name in _INDEXES):
        return None
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds {len(found)} GGUF files; name the one to convert.")
    _check_inside(found[0], folder)
    return found[0]


def unread_weights(folder: Path) -> str | None:
    """Return what to do with weights in a form that is not read, if a folder has some; one clause."""
    for pattern, advice in _UNREAD.items():
        if found := next(folder.glob(pattern), None):
            return f"{found.relative_to(folder)} is {advice}"
    return None


def _open_gguf(file: Path, path: Path, stream_fields: dict[str, Any] | None) -> Checkpoint:
    from .gguf.architecture import model_config
    from .gguf.file import open_gguf
    from .gguf.folder import gguf_tensors
    from .gguf.tokenizer import token_ids, tokenizer_files

    gguf = open_gguf(file)
    ids = token_ids(gguf)
    files: dict[str, Path | str] = dict(tokenizer_files(gguf))
    files["generation_config.json"] = json.dumps(ids, indent=2) + "\n"
    side = _side_tensors(_side_files(file.parent)) if stream_fields is not None else {}
    return Checkpoint(
        path=path,
        tensors={tensor.name: tensor for tensor in gguf_tensors(gguf)},
        side=side,
        config={**model_config(gguf), **ids},
        stream_fields=stream_fields,
        files=files,
    )
