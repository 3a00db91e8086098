"""Stream weights on disk, schema 1: a folder with `speculative_streaming.json` and `stream_model.safetensors`.

Tensor names are PEFT's (`base_model.model.model.layers.{i}.{module}.lora_A.weight`, (r, in)), with
`stream_embeddings.weight`, `stream_init.lora_A|B.weight`, `pruner.lora_A|B.weight` and
`conditioner.{mlp_in,mlp_out,lora_A,lora_B}.weight` beside them. Base weights are named, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...config import StreamConfig
from ...errors import CheckpointError
from ...weights.files import atomic_folder
from ...weights.tensorfile import difference
from .adapters import StreamAdapters
from .backbone import TorchBackbone

CONFIG_NAME, WEIGHTS_NAME = "speculative_streaming.json", "stream_model.safetensors"
SCHEMA = 1


def checkpoint_name(parameter: str) -> str:
    """Return the name on disk of a `StreamAdapters` parameter.

    `lora.18.self_attn/q_proj.lora_A.weight` -> `base_model.model.model.layers.18.self_attn.q_proj.lora_A.weight`
    """
    if parameter == "stream_embeddings":
        return "stream_embeddings.weight"
    if parameter.startswith("lora."):
        return "base_model.model.model.layers." + parameter.removeprefix("lora.").replace("/", ".")
    return parameter


def save_checkpoint(
    path: str | Path,
    adapters: StreamAdapters,
    base_model: str,
    dtype: torch.dtype = torch.float32,
    extra_files: dict[str, str] | None = None,
) -> None:
    """Write `adapters` as a schema-1 folder, complete or not at all; `extra_files` are texts that go with it."""
    fields = asdict(adapters.config)
    fields["stream_init"] = "low_rank" if adapters.config.stream_init_rank else "identity"
    fields["target_modules"] = list(adapters.config.target_modules)
    config = {"schema": SCHEMA, "base_model_name_or_path": base_model, **fields}
    tensors = {
        checkpoint_name(name): tensor.detach().to(dtype).contiguous()
        for name, tensor in adapters.state_dict().items()
    }
    with atomic_folder(path, if_exists="replace") as folder:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (folder / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def read_config(path: str | Path) -> StreamConfig:
    """Read a schema-1 config.

    Raises:
        CheckpointError: the file is missing or of another schema.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG_NAME}; a schema-1 checkpoint folder was expected."
        )
    fields = json.loads(file.read_text(encoding="utf-8"))
    if fields.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{file} has schema {fields.get('schema')!r}; only schema {SCHEMA} is known here."
        )
    known = set(StreamConfig.__dataclass_fields__)
    return StreamConfig(**{name: value for name, value in fields.items() if name in known})


def load_checkpoint(path: str | Path, backbone: TorchBackbone) -> StreamAdapters:
    """Read a schema-1 folder as float32 adapters for `backbone`.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    adapters = StreamAdapters(read_config(path), backbone)
    fill(adapters, load_file(str(Path(path) / WEIGHTS_NAME)), path)
    return adapters


def fill(adapters: StreamAdapters, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy tensors under their names on disk into `adapters`.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; `path` says where.
    """
    wanted = {checkpoint_name(name): parameter for name, parameter in adapters.named_parameters()}
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in each.items()} for each in (tensors, wanted)
    )
    if odd := difference(found, expected):
        raise CheckpointError(f"{path}: {odd}.")
    for name, parameter in wanted.items():
        parameter.data.copy_(tensors[name])
