"""The base model's side of a conversion: mlx-lm's own model class says what the weights must be.

The class is built with placeholders that are never computed: its parameters give every name and
shape, its `sanitize` renames and drops, mlx-lm's quantiser says which layers become what. Weights
flow through one at a time, so memory holds one tensor and its result, not the model.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError, shown
from ..weights.fingerprint import (
    BaseDims,
    base_dims,
    embedding_name,
    fingerprint,
    make_fingerprint,
    sketch_rows,
)
from ..weights.tensorfile import FLOATS, MLX_TYPES, TensorSpec, cast_bits, dtype_name, to_mlx
from .names import Named, Shape, fit_base, nearest
from .quantise import Quantisation, give_quantised_layers, quantise
from .steps import Delta, Step, materialise, plain_dtype
from .tensors import SourceTensor

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class BasePlan:
    """What will be written of the base: a config and the steps that make its tensors, in order."""

    model: nn.Module
    config: dict[str, Any]
    steps: tuple[Step, ...]

    def dims(self) -> BaseDims:
        """The sizes that stream tensors depend on."""
        return base_dims(self.model)

    def fingerprint(self) -> str:
        """Fingerprint the base; reads a few rows of its token embeddings, or all if it must."""
        name = f"{embedding_name(self.model)}.weight"
        for step in self.steps:
            if step.outputs[0].name != name:
                continue
            source = step.plain_copy
            if source is not None:
                rows = np.stack([source.read_row(row) for row in sketch_rows(source.shape[0])])
                return make_fingerprint(
                    str(self.config["model_type"]),
                    len(self.model.layers),
                    source.shape[0],
                    cast_bits(rows, source.dtype, "F32"),
                )
            pairs = zip(step.outputs, step.make(), strict=True)
            weights = [(spec.name, to_mlx(bits, spec.dtype)) for spec, bits in pairs]
            self.model.load_weights(weights, strict=False)
        return fingerprint(self.model)


def plan_base(
    tensors: Mapping[str, SourceTensor],
    config: dict[str, Any],
    where: Path,
    *,
    dtype: str | None = None,
    quantisation: Quantisation | None = None,
    deltas: Mapping[str, Delta] | None = None,
) -> BasePlan:
    """Plan the base model's weights.

    Args:
        tensors: base weights in Hugging Face names (nearly: see `names.fit_base`).
        config: config.json as `configs.base_config` returns it.
        where: the checkpoint, for messages.
        dtype: float16, bfloat16 or float32; by default the config's, else each tensor's own.
        deltas: weight name -> LoRA product to merge into it.

    Raises:
        CheckpointError: the model type is unknown, or a tensor is unknown, missing or misshapen.
        OptionError: a quantisation that mlx does not have.
    """
    config = _with_tying(config, tensors)
    model = build_model(config, where)
    wanted = {name: tuple(value.shape) for name, value in parameters(model).items()}
    fitted = fit_base(tensors, wanted)
    if unused := sorted(set(deltas or ()) - set(fitted)):
        raise CheckpointError(
            f"{where}: the adapter changes {shown(unused[0])}, which the base lacks."
        )
    sources = _sanitised(model, fitted, where)
    _check_complete({name: _shape(value) for name, value in sources.items()}, wanted, where)
    target = dtype or config.get("torch_dtype") or config.get("dtype")
    target = target if target in DTYPES else None
    casts = _casts(model, sources, target)
    model.load_weights([(name, mx.zeros(wanted[name], MLX_TYPES[casts[name]])) for name in wanted])
    plain = dict(model.named_modules())
    if quantisation is not None:
        model, config = quantise(model, config, quantisation)
    if target is not None:
        config = {**config, "torch_dtype": target, "dtype": target}
    steps = _steps(model, plain, sources, casts, deltas or {})
    return BasePlan(model, config, tuple(steps))


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by full name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def build_model(config: dict[str, Any], where: Path) -> nn.Module:
    """Build mlx-lm's model of a config, parameters lazy and never computed.

    Raises:
        CheckpointError: mlx-lm has no such model, or the config does not fit it.
    """
    from mlx_lm.utils import _get_classes

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model_class, arguments_class = _get_classes(config)
    except (ValueError, KeyError, ImportError):
        raise CheckpointError(
            f"{where}: mlx-lm has no model of the type {shown(config['model_type'])}; update"
            " mlx-lm."
        ) from None
    try:
        model: nn.Module = model_class(arguments_class.from_dict(config))
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        OverflowError,
    ) as error:
        raise CheckpointError(
            f"{where}: config.json does not describe a {config['model_type']} model ({error})."
        ) from None
    if "quantization" in config:
        give_quantised_layers(model, config, where)
    return model


def _with_tying(config: dict[str, Any], tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    """Say whether the head is tied where the config does not: mlx-lm would drop a head unasked."""
    if "tie_word_embeddings" in config:
        return config
    head = next((t for name, t in tensors.items() if name.endswith("lm_head.weight")), None)
    embedding = next(
        (t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None
    )
    tied = head is None or (
        embedding is not None
        and head.shape == embedding.shape
        and np.array_equal(head.read(), embedding.read())
    )
    return {**config, "tie_word_embeddings": tied}


def _sanitised(
    model: nn.Module, fitted: dict[str, Named], where: Path
) -> dict[str, Named | mx.array]:
    """Let mlx-lm rename and drop weights, on placeholders; real arrays only if it computes.

    Returns name -> its source, or a lazy array where `sanitize` made something new.
    """
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return dict(fitted)
    placeholders = {
        name: mx.zeros(each.shape, MLX_TYPES[plain_dtype(each)]) for name, each in fitted.items()
    }
    known = {id(value): name for name, value in placeholders.items()}
    try:
        result = sanitize(dict(placeholders))
        if all(id(value) in known for value in result.values()):
            return {name: fitted[known[id(value)]] for name, value in result.items()}
        return dict(sanitize({name: _lazy(each) for name, each in fitted.items()}))
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where}: mlx-lm cannot bring these weights into its own form ({type(error).__name__}:"
            f" {shown(str(error))}); check that config.json belongs to them."
        ) from None


def _lazy(named: Named) -> mx.array:
    """Return a tensor that is read when it is computed: MLX reads safetensors files so."""
    source = named.sources[0]
    if named.is_plain and source.origin.suffix == ".safetensors" and source.dtype in MLX_TYPES:
        loaded = mx.load(str(source.origin))
        if isinstance(loaded, dict) and source.name in loaded:
            return loaded[source.name]
    return to_mlx(materialise(named), plain_dtype(named))


def _shape(value: Named | mx.array) -> Shape:
    return tuple(value.shape)


def _check_complete(found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: Path) -> None:
    """Refuse the first tensor that is unknown, missing or of another shape."""
    for name, shape in found.items():
        if name not in wanted:
            raise CheckpointError(f"{where}: {nearest(name, shape, wanted)}; see --rules.")
        if shape != wanted[name]:
            raise CheckpointError(f"{where}: {name} has shape {shape}, expected {wanted[name]}.")
    for name, shape in wanted.items():
        if name not in found:
            hint = f" ({nearest(name, shape, found)})" if found else ""
            raise CheckpointError(f"{where}: the tensor {name} {shape} is missing{hint}.")


def _casts(
    model: nn.Module, sources: Mapping[str, Named | mx.array], target: str | None
) -> dict[str, str]:
    """Return name -> the dtype it is written in (before quantising)."""
    may_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    casts = {}
    for name, value in sources.items():
        own = plain_dtype(value) if isinstance(value, Named) else dtype_name(value.dtype)
        casts[name] = DTYPES[target] if target and own in FLOATS and may_cast(name) else own
    return casts


def _steps(
    model: nn.Module,
    plain: Mapping[str, nn.Module],
    sources: Mapping[str, Named | mx.array],
    casts: Mapping[str, str],
    deltas: Mapping[str, Delta],
) -> list[Step]:
    """Return one step per source tensor; a quantised layer's weight makes two or three tensors."""
    specs = {
        name: TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))
        for name, value in parameters(model).items()
    }
    modules = dict(model.named_modules())
    steps = []
    for name, source in sources.items():
        path = name.rpartition(".")[0]
        module = modules.get(path) if name.endswith(".weight") else None
        fresh = (
            module is not None and hasattr(module, "scales") and not hasattr(plain[path], "scales")
        )
        parts = [f"{path}.{part}" for part in ("weight", "scales", "biases")] if fresh else [name]
        outputs = tuple(specs[part] for part in parts if part in specs)
        steps.append(
            Step.of(outputs, source, casts[name], module if fresh else None, deltas.get(name))
        )
    order = {name: index for index, name in enumerate(specs)}
    return sorted(steps, key=lambda step: order[step.outputs[0].name])
