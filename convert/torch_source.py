"""The proof's source, read by PyTorch's and safetensors' own readers; GGUF, which neither reads, by ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError, brief, shown
from .tensors import Tensor

if TYPE_CHECKING:
    import torch


class TorchFiles:
    """The tensors of files, read by PyTorch or safetensors, one file in memory at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}

    def read(self, tensor: Tensor) -> torch.Tensor:
        """Return the tensor that is in a file, float32, before anything is done to it."""
        return self.raw(tensor).float()

    def raw(self, tensor: Tensor) -> torch.Tensor:
        """Return the tensor that is in a file, in its own type."""
        import torch

        path, name = tensor.sources[0]
        if path.suffix == ".gguf":
            return torch.from_numpy(np.ascontiguousarray(tensor.read()))
        if path != self._path:
            self._path, self._tensors = path, _load(path)
        names = [name, name.removeprefix("conditioner."), f"conditioner.{name}"]
        for each in names if path.stem == "conditioner" else names[:1]:
            if each in self._tensors:
                return self._tensors[each].detach()
        raise CheckpointError(f"--check: PyTorch finds no tensor {shown(name)} in {path}.")


def _load(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a file by name; of a name that comes twice in a trainer's file, none."""
    import torch
    from safetensors.torch import load_file

    with path.open("rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if is_safetensors:
        return load_file(str(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise CheckpointError(
            f"--check: torch.load refuses {path} ({brief(error)}); save the model's state_dict() alone."
        ) from None
    found: dict[str, torch.Tensor] = {}
    twice: set[str] = set()
    pending = [loaded]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, torch.Tensor) and isinstance(name, str):
                if name in found and not torch.equal(found[name], value):
                    twice.add(name)
                found[name] = value
    return {name: value for name, value in found.items() if name not in twice}
