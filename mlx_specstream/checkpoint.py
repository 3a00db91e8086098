"""Stream weights on disk: `streams.safetensors` and `streams_config.json`.

    adapter/                     model/  (a plain mlx-lm folder, and still one)
      streams.safetensors          config.json, model.safetensors, tokenizer ...
      streams_config.json          streams.safetensors, streams_config.json

The config names every tensor the file must hold (`stream_shapes`), so a missing, unknown or
misshapen tensor is an error here and never silent nonsense later. mlx-lm reads `model*.safetensors`
only and does not see these files. The format is described for writers of other programs in
docs/checkpoint-format.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import StreamsError
from mlx_specstream.files import atomic_file, atomic_folder
from mlx_specstream.fingerprint import BaseDims, base_dims, fingerprint, same_base
from mlx_specstream.tensorfile import (
    TensorSpec,
    TensorWriter,
    brief,
    dtype_name,
    open_tensors,
    shown,
    to_bits,
    to_mlx,
)

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
MAX_LAYERS = 4096
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,4})\.(.+)")


@dataclass(frozen=True)
class BaseFingerprint:
    """The base the streams were trained for: a name to find it by, a fingerprint to know it by."""

    name: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class StreamWeights:
    """Loaded streams; `tensors` are complete, with the shapes of `stream_shapes(config, ...)`."""

    config: StreamConfig
    tensors: dict[str, mx.array]
    base: BaseFingerprint | None
    folder: Path
    metadata: dict[str, str] = field(default_factory=dict)

    def check_base(self, model: nn.Module) -> None:
        """Make sure that these streams belong to `model`, an mlx-lm model (quantised or not).

        Raises:
            StreamsError: sizes or fingerprint differ; says which, and which base is wanted.
        """
        name = self.base.name if self.base else None
        wanted = (
            f"; load them with {name}"
            if name
            else "; load them with the base model they were trained on"
        )
        dims = base_dims(model)
        if (
            self.base
            and self.base.fingerprint
            and (reason := same_base(self.base.fingerprint, fingerprint(model)))
        ):
            raise StreamsError(
                f"the streams in {self.folder} belong to another base model: {reason}{wanted}."
            )
        check_tensors(
            self.config,
            {key: tuple(value.shape) for key, value in self.tensors.items()},
            str(self.folder),
            dims,
        )


def stream_shapes(
    config: StreamConfig, dims: BaseDims, *, all_layers: bool = False, gates: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that streams of this config have on such a base.

    γ = 4, h = 576, N = 30, N_s = 1, rank 8 on q:
        stream_embeddings                  (4, 576)
        layers.29.self_attn.q_proj.lora_a  (576, 8)
        layers.29.self_attn.q_proj.lora_b  (8, 576)

    `all_layers`: adapters on lower layers too (shared mode only). `gates`: `layers.{i}.stream_gate`
    (heads,).

    Raises:
        StreamsError: more MSA layers than layers, or an adapted module that the base does not have.
    """
    h, N = dims.hidden_size, dims.num_layers
    if config.num_msa_layers > N:
        raise StreamsError(
            f"the streams want {config.num_msa_layers} MSA layers but the base model has {N}"
            " layers; use the base they were trained on."
        )
    shapes: dict[str, tuple[int, ...]] = {"stream_embeddings": (config.num_streams, h)}
    for part, rank in (("stream_init", config.stream_init_rank), ("pruner", config.pruner_rank)):
        if rank:
            shapes |= {f"{part}.lora_a": (h, rank), f"{part}.lora_b": (rank, h)}
    if config.conditioner_rank:
        hidden, rank = config.conditioner_hidden, config.conditioner_rank
        shapes |= {"conditioner.mlp_in": (hidden, 2 * h), "conditioner.mlp_out": (h, hidden)}
        shapes |= {"conditioner.lora_a": (h, rank), "conditioner.lora_b": (rank, h)}
    msa_start = N - config.num_msa_layers
    for layer in range(0 if all_layers else msa_start, N):
        for module in config.target_modules:
            modules = dims.modules_of(layer)
            if module not in modules:
                raise StreamsError(
                    f"the streams adapt the module {shown(module)}, which the base model's layer"
                    f" {layer} does not have; it has {', '.join(modules)}."
                )
            inputs, outputs = modules[module]
            name = f"layers.{layer}.{module}"
            shapes |= {
                f"{name}.lora_a": (inputs, config.lora_rank),
                f"{name}.lora_b": (config.lora_rank, outputs),
            }
        if gates and layer >= msa_start:
            shapes[f"layers.{layer}.stream_gate"] = (dims.num_heads,)
    return shapes


def load_streams(folder: Path | str) -> StreamWeights:
    """Read the stream files of a model folder or an adapter folder.

    Tensors are float16, bfloat16 or float32, as saved. Whether they fit a base model is checked by
    `StreamWeights.check_base`; that they fit their own config and each other is checked here.

    Raises:
        StreamsError: files missing, damaged, of two different saves or an unknown version; tensors
            missing, unknown, misshapen or not finite. One sentence.
    """
    folder = Path(folder).expanduser()
    where = folder / CONFIG_FILE
    fields = _read_config(where)
    base = BaseFingerprint(
        _text_or_none(fields, "base_model", where), _text_or_none(fields, "base_fingerprint", where)
    )
    digest = _text_or_none(fields, "tensors_digest", where)
    metadata = fields.pop("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise StreamsError(f"{where}: metadata must map names to strings.")
    try:
        config = StreamConfig.from_dict(fields)
    except StreamsError as error:
        raise StreamsError(f"{where}: {brief(error)}") from None
    file = open_tensors(folder / WEIGHTS_FILE, StreamsError)
    if digest is not None and digest != file.metadata.get("tensors_digest"):
        raise StreamsError(
            f"{where} and {WEIGHTS_FILE} come from two different saves; copy or write both again."
        )
    _check_types(list(file.entries.values()), file.path)
    check_tensors(config, {spec.name: spec.shape for spec in file.entries.values()}, str(file.path))
    tensors = {
        spec.name: _finite(file.read(spec.name), spec, file.path) for spec in file.entries.values()
    }
    known = base if base.name or base.fingerprint else None
    return StreamWeights(config, tensors, known, folder, metadata)


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

    A new folder appears whole or not at all. In an existing one the config is replaced last and
    carries a digest of the tensors, so a kill in between is noticed by `load_streams` instead of
    mixing two saves.

    Raises:
        StreamsError: the tensors do not fit the config or are not finite; nothing is written.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    check_tensors(
        config, {name: tuple(value.shape) for name, value in tensors.items()}, "these streams"
    )
    specs = [
        TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))
        for name, value in sorted(tensors.items())
    ]
    _check_types(specs, folder)
    bits = {spec.name: to_bits(tensors[spec.name]) for spec in specs}
    for spec in specs:
        _finite(bits[spec.name], spec, folder)
    digest = hashlib.sha256()
    for spec in specs:
        digest.update(f"{spec.name} {spec.dtype} {spec.shape}".encode())
        digest.update(np.ascontiguousarray(bits[spec.name]).data)
    ours = {
        "base_model": base_model,
        "base_fingerprint": fingerprint,
        "tensors_digest": digest.hexdigest()[:32],
        "metadata": metadata or {},
    }
    text = json.dumps({**config.to_dict(), **ours}, indent=2, ensure_ascii=False) + "\n"

    def write_weights(path: Path) -> None:
        with TensorWriter(
            path, specs, {"format": "mlx", "tensors_digest": str(ours["tensors_digest"])}
        ) as writer:
            for spec in specs:
                writer.write(bits[spec.name])

    if folder.is_dir() and any(folder.iterdir()):
        with atomic_file(folder / WEIGHTS_FILE, if_exists="replace") as path:
            write_weights(path)
        with atomic_file(folder / CONFIG_FILE, if_exists="replace") as path:
            path.write_text(text, encoding="utf-8")
        return
    with atomic_folder(folder, if_exists="error") as partial:
        write_weights(partial / WEIGHTS_FILE)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def check_tensors(
    config: StreamConfig,
    found: dict[str, tuple[int, ...]],
    where: str,
    dims: BaseDims | None = None,
) -> None:
    """Compare names and shapes of stream tensors with what config (and base, if given) ask for.

    Raises:
        StreamsError: the first difference, with both shapes.
    """
    if dims is None:
        dims = _dims_from_tensors(config, found, where)
    layers = [int(match[1]) for name in found if (match := _LAYER.fullmatch(name))]
    lower = (
        config.mode == "shared"
        and bool(layers)
        and min(layers) < dims.num_layers - config.num_msa_layers
    )
    gates = config.mode == "shared" and any(name.endswith(".stream_gate") for name in found)
    expected = stream_shapes(config, dims, all_layers=lower, gates=gates)
    for name, shape in expected.items():
        if name not in found:
            raise StreamsError(f"{where}: the tensor {name} {shape} is missing.")
        if found[name] != shape:
            raise StreamsError(
                f"{where}: the tensor {name} has shape {found[name]}, expected {shape}."
            )
    if unknown := sorted(set(found) - set(expected)):
        raise StreamsError(
            f"{where}: the tensor {shown(unknown[0])} {found[unknown[0]]} does not belong to"
            " streams of this config."
        )


def _dims_from_tensors(
    config: StreamConfig, found: dict[str, tuple[int, ...]], where: str
) -> BaseDims:
    """Derive the base's sizes from the tensors, to check that they agree with each other."""
    embeddings = found.get("stream_embeddings")
    if (
        embeddings is None
        or len(embeddings) != 2
        or embeddings[0] != config.num_streams
        or embeddings[1] < 1
    ):
        given = "missing" if embeddings is None else f"of shape {embeddings}"
        raise StreamsError(
            f"{where}: stream_embeddings is {given}, expected ({config.num_streams}, width of the"
            " base model)."
        )
    if config.num_msa_layers > MAX_LAYERS:
        raise StreamsError(
            f"{where}: {config.num_msa_layers} MSA layers are more than any model has layers;"
            " correct num_msa_layers."
        )
    layers, heads = [config.num_msa_layers - 1], 1
    modules: dict[str, tuple[int, int]] = {}
    by_layer: dict[int, dict[str, tuple[int, int]]] = {}
    for name, shape in found.items():
        if not (match := _LAYER.fullmatch(name)) or not shape:
            continue
        layers.append(int(match[1]))
        module, _, part = match[2].rpartition(".")
        if part == "lora_a" and module in config.target_modules:
            outputs = found.get(f"layers.{match[1]}.{module}.lora_b", (0, 0))
            widths = (shape[0], outputs[-1] if outputs else 0)
            modules.setdefault(module, widths)
            by_layer.setdefault(int(match[1]), {})[module] = widths
        elif match[2] == "stream_gate":
            heads = shape[0]
    if missing := [module for module in config.target_modules if module not in modules]:
        raise StreamsError(
            f"{where}: the adapters of {missing[0]} are missing although target_modules lists it."
        )
    return BaseDims(
        hidden_size=embeddings[1],
        num_layers=max(layers) + 1,
        num_heads=heads,
        modules=modules,
        by_layer={layer: {**modules, **own} for layer, own in by_layer.items()},
    )


def _read_config(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > 1 << 20:
            raise StreamsError(
                f"{path} is larger than 1 MB, too large for a streams config; get it again."
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StreamsError(
            f"{path.parent} holds no {path.name}; name a folder with stream weights, or make one"
            " with specstream convert or specstream train."
        ) from None
    except OSError as error:
        raise StreamsError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its"
            " permissions."
        ) from None
    except (ValueError, RecursionError):
        raise StreamsError(f"{path} is not valid JSON; get the file again.") from None
    if not isinstance(fields, dict):
        raise StreamsError(f"{path} must hold a JSON object; get the file again.")
    return fields


def _text_or_none(fields: dict[str, object], name: str, where: Path) -> str | None:
    value = fields.pop(name, None)
    if value is None or isinstance(value, str):
        return value
    raise StreamsError(f"{where}: {name} must be a string or null, got {shown(value)}.")


def _check_types(specs: Sequence[TensorSpec], where: Path) -> None:
    for spec in specs:
        if spec.dtype not in ("F32", "F16", "BF16"):
            raise StreamsError(
                f"{where}: {shown(spec.name)} is {spec.dtype}, expected F32, F16 or BF16."
            )


def _finite(bits: np.ndarray, spec: TensorSpec, where: Path) -> mx.array:
    tensor = to_mlx(bits, spec.dtype)
    if not mx.all(mx.isfinite(tensor)).item():
        raise StreamsError(
            f"{where}: the tensor {spec.name} holds NaN or infinite values; the training run"
            " diverged or the file is damaged."
        )
    return tensor
