"""The configs of a checkpoint, checked and in one form: base model, streams, PEFT adapter."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import FORMAT_VERSION, StreamConfig
from ..errors import CheckpointError, StreamsError, brief, shown

SCHEMA = 1
MAX_LAYERS = 4096
MAX_SIZE = 1 << 24
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
_PEFT_UNSUPPORTED = {
    "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
    "bias": "none", "layer_replication": None, "trainable_token_indices": None, "lora_bias": False,
    "target_parameters": None, "use_qalora": False, "alora_invocation_tokens": None, "arrow_config": None,
}  # fmt: skip
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a LoRA that change the base weights as well: its product belongs to the changed ones."""
_STREAM_MODULES = ("stream_embeddings", "stream_init", "pruner", "conditioner")


@dataclass(frozen=True)
class PeftAdapter:
    """A plain LoRA adapter: its rank and the factor on B·A."""

    rank: int
    scale: float


def base_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a config.json that every mlx-lm understands.

    transformers 5 writes RoPE's settings as `rope_parameters` alone, which mlx-lm may not read: it
    would silently rotate by its default base of 10000. `rope_theta`, `rope_scaling` and
    `partial_rotary_factor` are written beside it. Sizes are checked to be sane.

    Raises:
        CheckpointError: no usable model_type, absurd sizes, or a quantisation of another program.
    """
    config = dict(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_\-]{1,64}", kind):
        raise CheckpointError(f"{path} has the model_type {shown(kind)}, which is not a name.")
    layers = config.get("num_hidden_layers", 1)
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        raise CheckpointError(f"{path} has {shown(layers)} layers, expected 1 to {MAX_LAYERS}.")
    for name in _SIZES:
        size = config.get(name)
        if size is not None and (type(size) is not int or not 1 <= size <= MAX_SIZE):
            raise CheckpointError(f"{path}: {name} is {shown(size)}, expected 1 to {MAX_SIZE}.")
    for name in ("torch_dtype", "dtype"):
        if not isinstance(config.get(name), str | None):
            raise CheckpointError(f"{path}: {name} is {shown(config[name])}, expected a name.")
    foreign = config.get("quantization_config")
    if foreign and "quantization" not in config:
        kind = foreign.get("quant_method", "?") if isinstance(foreign, dict) else "?"
        raise CheckpointError(
            f"{path}: the model is quantised by another program ({shown(kind)}); convert the "
            "original weights, or this base with mlx_lm.convert and give its folder as --base."
        )
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope and config.get(name) is None:
                config[name] = rope[name]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        scaled = scaling.get("rope_type", "default") != "default"
        if scaled and config.get("rope_scaling") is None:
            config["rope_scaling"] = {**scaling, "type": scaling["rope_type"]}
    return config


def stream_config(
    fields: Mapping[str, Any], conditioner: Mapping[str, tuple[int, ...]], path: Path
) -> StreamConfig:
    """Read the fields of `speculative_streaming.json`.

    Args:
        fields: the JSON object.
        conditioner: shapes of the conditioner's tensors, whose sizes a config may leave out.

    Raises:
        CheckpointError: another schema, unknown fields, values out of range.
    """
    values = dict(fields)
    schema = values.pop("schema", values.pop("schema_version", None))
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {shown(schema)}, expected {SCHEMA}; see docs/checkpoint-format.md."
        )
    values.pop("base_model_name_or_path", None)
    start = values.pop("stream_init", "low_rank" if values.get("stream_init_rank") else "identity")
    rank = values.get("stream_init_rank", 0)
    if start not in ("identity", "low_rank") or (start == "low_rank") != bool(rank):
        raise CheckpointError(
            f"{path}: stream_init is {shown(start)} with stream_init_rank {shown(rank)}; expected "
            "'identity' with rank 0 or 'low_rank' with a rank."
        )
    if "conditioner_rank" not in values and len(conditioner.get("conditioner.lora_a", ())) == 2:
        values["conditioner_rank"] = conditioner["conditioner.lora_a"][1]
        seen = conditioner.get("conditioner.mlp_in", (0, 0))
        values["conditioner_hidden"] = seen[0]
        values["conditioner_tokens"] = seen[-1] // conditioner["conditioner.lora_a"][0] - 1
    try:
        return StreamConfig.from_dict({**values, "version": FORMAT_VERSION})
    except (StreamsError, TypeError) as error:
        raise CheckpointError(f"{path}: {brief(error, 500)}.") from None


def stream_fields(config: StreamConfig, base_model: str | None) -> dict[str, Any]:
    """Return the fields of `speculative_streaming.json` for a config; the reverse of the above."""
    values = dataclasses.asdict(config)
    values["target_modules"] = list(config.target_modules)
    start = "low_rank" if config.stream_init_rank else "identity"
    base = {"base_model_name_or_path": base_model} if base_model else {}
    return {"schema": SCHEMA, **base, **values, "stream_init": start}


def peft_adapter(fields: Mapping[str, Any], path: Path) -> PeftAdapter:
    """Read PEFT's adapter_config.json.

    Raises:
        CheckpointError: not LoRA, or a variant of it that is not one low-rank product per module.
    """
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: the adapter is {shown(fields.get('peft_type'))}, not LORA.")
    for name, plain in _PEFT_UNSUPPORTED.items():
        if fields.get(name) not in (plain, None):
            raise CheckpointError(
                f"{path}: {name} is {shown(fields[name])}, which is not supported; merge the "
                "adapter in PEFT (merge_and_unload) and convert the result."
            )
    saved = fields.get("modules_to_save") or []
    start = str(fields.get("init_lora_weights"))[:100].lower()
    for name, is_fine in (
        ("modules_to_save", isinstance(saved, list) and all(map(_is_stream_module, saved))),
        ("init_lora_weights", not start.startswith(_MOVES_THE_BASE)),
    ):
        if not is_fine:
            raise CheckpointError(
                f"{path}: {name} is {shown(fields[name])}: it changes base weights; merge the adapter "
                "in PEFT (merge_and_unload) and convert the result."
            )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if (
        type(rank) is not int
        or not 1 <= rank <= MAX_SIZE
        or isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not abs(alpha) < MAX_SIZE
    ):
        raise CheckpointError(f"{path}: r {shown(rank)} and lora_alpha {shown(alpha)} are no LoRA.")
    return PeftAdapter(rank, alpha / (rank**0.5 if fields.get("use_rslora") else rank))


def _is_stream_module(name: object) -> bool:
    return isinstance(name, str) and name.rpartition(".")[2] in _STREAM_MODULES


def base_name(*fields: Mapping[str, Any] | None) -> str | None:
    """Return the base model that a stream or adapter config names."""
    for each in fields:
        name = each.get("base_model_name_or_path") if each else None
        if isinstance(name, str) and name:
            return name
    return None
