"""Drafters that are not streams on disk: `drafter.safetensors` and `drafter_config.json`.

`drafter_shapes` names every tensor of a kind, so a missing, unknown or misshapen one is an error.
Matrices are (out, in), as `nn.Linear` holds them.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from ..config import DrafterConfig, LayerConfig
from ..errors import StreamsError
from .adapter_files import AdapterFiles, AdapterWeights, BaseFingerprint, check_fingerprint
from .fingerprint import base_dims
from .tensorfile import Shape, difference

WEIGHTS_FILE = "drafter.safetensors"
CONFIG_FILE = "drafter_config.json"
FILES = AdapterFiles(WEIGHTS_FILE, CONFIG_FILE, "a drafter", tables=("d2t",))


class DrafterWeights(AdapterWeights[DrafterConfig]):
    """A loaded drafter; `tensors` are complete, with the shapes of `drafter_shapes(config)`."""

    def check_base(self, model: nn.Module) -> None:
        """Make sure that the drafter belongs to `model`, an mlx-lm model (quantised or not).

        Raises:
            StreamsError: sizes or fingerprint differ; says which, and which base is wanted.
        """
        check_fingerprint("drafter's weights", self.folder, self.base, model)
        dims, config = base_dims(model), self.config
        if dims.hidden_size != config.hidden_size:
            raise StreamsError(
                f"the drafter in {self.folder} is for a model of width {config.hidden_size}, and "
                f"this one has {dims.hidden_size}; load it with the model it was trained on."
            )
        if config.feature_layers and max(config.feature_layers) >= dims.num_layers:
            raise StreamsError(
                f"the drafter in {self.folder} takes features of layer "
                f"{max(config.feature_layers)}, and this model has {dims.num_layers} layers; load it "
                "with the model it was trained on."
            )


def load_drafter(folder: Path | str) -> DrafterWeights:
    """Read the drafter files of a folder, checked against their own config.

    Raises:
        StreamsError: files missing, damaged, of two different saves or an unknown version; tensors
            missing, unknown, misshapen or not finite. One sentence.
    """
    found = FILES.open(folder)
    config = found.config(DrafterConfig.from_dict)
    if odd := difference(found.shapes, drafter_shapes(config)):
        raise StreamsError(f"{found.file.path}: {odd}.")
    tensors = found.tensors()
    _check_table(config, tensors.get("d2t"), found.file.path)
    return DrafterWeights(config, tensors, found.base, found.folder, found.metadata)


def save_drafter(
    folder: Path | str,
    config: DrafterConfig,
    tensors: dict[str, mx.array],
    *,
    base_model: str | None,
    fingerprint: str | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the two drafter files into `folder`, a new one or beside what it holds.

    Raises:
        StreamsError: the tensors do not fit the config or are not finite; nothing is written.
        OutputError: the folder cannot be written.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if odd := difference(shapes, drafter_shapes(config)):
        raise StreamsError(f"this drafter: {odd}.")
    _check_table(config, tensors.get("d2t"), "this drafter")
    base = BaseFingerprint(base_model, fingerprint)
    FILES.save(folder, config.to_dict(), tensors, base, metadata, "this drafter")


def drafter_shapes(config: DrafterConfig) -> dict[str, Shape]:
    """Return name -> shape of every tensor that a drafter of this config has.

    Medusa, two heads of one block on h = 64, sharing the base's LM head:

        heads.0.blocks.0.weight  (64, 64)    heads.0.blocks.0.bias  (64,)
        heads.1.blocks.0.weight  (64, 64)    heads.1.blocks.0.bias  (64,)
    """
    h, V = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {}
    for i in range(config.num_heads):
        name = f"heads.{i}"
        for block in range(config.num_blocks):
            # Hydra's first block takes the state and the embeddings of i + 1 tokens.
            width = (i + 2) * h if config.kind == "hydra" and block == 0 else h
            shapes |= _linear(f"{name}.blocks.{block}", h, width, bias=True)
        if config.kind == "hydra":
            shapes |= _linear(f"{name}.residual", h, (i + 2) * h, bias=True)
        if config.own_head:
            shapes |= _linear(f"{name}.head", V, h, bias=config.bias)
    if config.layer is None:
        return shapes
    width = config.layer.hidden_size
    if config.kind == "hydra":
        shapes |= _layer("prefix", config.layer, width)
        shapes |= {"prefix.input_layernorm.weight": (width,), "norm.weight": (width,)}
    elif config.kind == "eagle":
        shapes |= _linear("fc", width, 2 * width, bias=config.bias)
        shapes |= _layer("layer", config.layer, width)
    else:
        shapes |= _linear("fc", width, config.num_features, bias=config.bias)
        shapes |= _layer("layer", config.layer, 2 * width)
        norms = ("layer.input_layernorm", "layer.hidden_norm", "norm")
        shapes |= {f"{name}.weight": (width,) for name in norms}
        if config.own_head:
            shapes |= _linear("head", config.draft_vocab_size, width, bias=False)
        if config.draft_vocab_size < V:
            shapes["d2t"] = (config.draft_vocab_size,)
        if config.own_embedding:
            shapes["embed_tokens.weight"] = (V, width)
    return shapes


def _layer(name: str, layer: LayerConfig, width: int) -> dict[str, Shape]:
    """Return the tensors of a decoder layer whose attention takes rows of `width`."""
    h, m, D = layer.hidden_size, layer.intermediate_size, layer.head_dim
    H, K = layer.num_attention_heads, layer.num_key_value_heads
    return {
        **_linear(f"{name}.self_attn.q_proj", H * D, width, bias=layer.attention_bias),
        **_linear(f"{name}.self_attn.k_proj", K * D, width, bias=layer.attention_bias),
        **_linear(f"{name}.self_attn.v_proj", K * D, width, bias=layer.attention_bias),
        **_linear(f"{name}.self_attn.o_proj", h, H * D, bias=False),
        **_linear(f"{name}.mlp.gate_proj", m, h, bias=False),
        **_linear(f"{name}.mlp.up_proj", m, h, bias=False),
        **_linear(f"{name}.mlp.down_proj", h, m, bias=False),
        f"{name}.post_attention_layernorm.weight": (h,),
    }


def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> dict[str, Shape]:
    weight: dict[str, Shape] = {f"{name}.weight": (outputs, inputs)}
    return {**weight, f"{name}.bias": (outputs,)} if bias else weight


def _check_table(config: DrafterConfig, table: mx.array | None, path: Path | str) -> None:
    """Make sure that a draft vocabulary's ids are ids of the base, each once."""
    if table is None:
        return
    ids = cast(list[int], table.tolist())
    if min(ids) < 0 or max(ids) >= config.vocab_size or len(set(ids)) < len(ids):
        raise StreamsError(
            f"{path}: d2t must name {config.draft_vocab_size} different tokens of the base's "
            f"{config.vocab_size}; the file is damaged or of another model."
        )
