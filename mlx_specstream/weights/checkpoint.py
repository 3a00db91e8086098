"""Stream weights on disk: `streams.safetensors` and `streams_config.json`.

    adapter/                     model/  (a plain mlx-lm folder, and still one)
      streams.safetensors          config.json, model.safetensors, tokenizer ...
      streams_config.json          streams.safetensors, streams_config.json

What the config asks for (`stream_tensors.py`) and what the file holds are compared before anything
is used. mlx-lm reads `model*.safetensors` only and does not see these files. The format is described
for writers of other programs in docs/checkpoint-format.md.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..config import StreamConfig
from .adapter_files import AdapterFiles, AdapterWeights, BaseFingerprint, check_fingerprint
from .fingerprint import base_dims, fingerprint
from .stream_tensors import check_tensors, stream_shapes

__all__ = [
    "BaseFingerprint",
    "StreamWeights",
    "fingerprint",
    "load_streams",
    "save_streams",
    "stream_shapes",
]

WEIGHTS_FILE = "streams.safetensors"
CONFIG_FILE = "streams_config.json"
FILES = AdapterFiles(WEIGHTS_FILE, CONFIG_FILE, "stream weights")


class StreamWeights(AdapterWeights[StreamConfig]):
    """Loaded streams; `tensors` are complete, with the shapes of `stream_shapes(config, ...)`."""

    def check_base(self, model: nn.Module) -> None:
        """Make sure that these streams belong to `model`, an mlx-lm model (quantised or not).

        Raises:
            StreamsError: sizes or fingerprint differ; says which, and which base is wanted.
        """
        check_fingerprint("streams", self.folder, self.base, model)
        check_tensors(
            self.config,
            {key: tuple(value.shape) for key, value in self.tensors.items()},
            str(self.folder),
            base_dims(model),
        )


def load_streams(folder: Path | str) -> StreamWeights:
    """Read the stream files of a model folder or an adapter folder.

    Tensors are float16, bfloat16 or float32, as saved. Whether they fit a base model is checked by
    `StreamWeights.check_base`; that they fit their own config and each other is checked here.

    Raises:
        StreamsError: files missing, damaged, of two different saves or an unknown version; tensors
            missing, unknown, misshapen or not finite. One sentence.
    """
    found = FILES.open(folder)
    config = found.config(StreamConfig.from_dict)
    check_tensors(config, found.shapes, str(found.file.path))
    return StreamWeights(config, found.tensors(), found.base, found.folder, found.metadata)


def save_streams(
    folder: Path | str,
    config: StreamConfig,
    tensors: dict[str, mx.array],
    *,
    base_model: str | None,
    fingerprint: str | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the two stream files into `folder`, a new one or beside what it holds.

    Raises:
        StreamsError: the tensors do not fit the config or are not finite; nothing is written.
        OutputError: the folder cannot be written.
    """
    check_tensors(
        config, {name: tuple(value.shape) for name, value in tensors.items()}, "these streams"
    )
    base = BaseFingerprint(base_model, fingerprint)
    FILES.save(folder, config.to_dict(), tensors, base, metadata, "these streams")
