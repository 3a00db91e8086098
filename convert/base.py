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
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError, brief, shown
from ..weights.fingerprint import (
    BaseDims,
    base_dims,
    embedding_name,
    fingerprint,
    make_fingerprint,
    sketch_rows,
)
from ..weights.tensorfile import (
    MLX_TYPES,
    TensorSpec,
    cast_bits,
    difference,
    dtype_name,
    to_mlx,
)
from .names import fit_base
from .quantise import Quantisation, give_quantised_layers, quantise
from .tensors import Tensor

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


class LoraPair(NamedTuple):
    """A LoRA product to merge into a weight: W + scale · B·A, with a (in, r) and b (r, out)."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class BasePlan:
    """What will be written of the base: a config and its tensors, in order."""

    model: nn.Module
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]

    def dims(self) -> BaseDims:
        """The sizes that stream tensors depend on."""
        return base_dims(self.model)

    def fingerprint(self) -> str:
        """Fingerprint the base; reads a few rows of its token embeddings, or all if it must."""
        embedding = embedding_name(self.model)
        own = [tensor for tensor in self.tensors if tensor.name.rpartition(".")[0] == embedding]
        if len(own) == 1 and own[0].start is not None:
            (tensor,) = own
            rows = np.stack([tensor.read_row(row) for row in sketch_rows(tensor.shape[0])])
            return make_fingerprint(
                str(self.config["model_type"]),
                len(self.model.layers),
                tensor.shape[0],
                cast_bits(rows, tensor.dtype, "F32"),
            )
        for tensor in own:  # packed, with its scales, as it is or as it will be
            pairs = zip(tensor.outputs, tensor.make(), strict=True)
            weights = [(spec.name, to_mlx(bits, spec.dtype)) for spec, bits in pairs]
            self.model.load_weights(weights, strict=False)
        return fingerprint(self.model)


def plan_base(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    path: Path,
    *,
    dtype: str | None = None,
    quantisation: Quantisation | None = None,
    deltas: Mapping[str, LoraPair] | None = None,
) -> BasePlan:
    """Plan the base model's weights.

    Args:
        tensors: base weights in Hugging Face names (nearly: see `names.fit_base`).
        config: config.json as `configs.base_config` returns it.
        path: the checkpoint, for messages.
        dtype: float16, bfloat16 or float32; by default the config's, else each tensor's own.
        deltas: weight name -> LoRA product to merge into it.

    Raises:
        CheckpointError: the model type is unknown, or a tensor is unknown, missing or misshapen.
        OptionError: a quantisation that mlx does not have.
    """
    config, tensors = _with_tying(config, tensors, path)
    model = build_model(config, path)
    wanted = {name: tuple(value.shape) for name, value in parameters(model).items()}
    fitted = fit_base(tensors, wanted)
    if unused := sorted(set(deltas or ()) - set(fitted)):
        raise CheckpointError(
            f"{path}: the adapter changes {shown(unused[0])}, which the base lacks."
        )
    sources = _sanitised(model, fitted, path)
    _check_types(sources, parameters(model), path)
    _check_deltas(deltas or {}, sources, path)
    wanted = {name: tuple(value.shape) for name, value in parameters(model).items()}  # as sanitised
    called = {name: tensor.sources[0][1] for name, tensor in sources.items() if tensor.sources}
    found = {name: tensor.shape for name, tensor in sources.items()}
    if odd := difference(found, wanted, called):
        raise CheckpointError(f"{path}: {odd}; check config.json, or see --rules.")
    target = dtype or _stated_dtype(config)
    may_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)
    tensors = {}
    for name, tensor in sources.items():
        own = tensor.dtype
        if pair := (deltas or {}).get(name):
            tensor = tensor.merged(*pair)
        to_target = target is not None and tensor.is_float and may_cast(name)
        tensors[name] = tensor.cast(DTYPES[target] if to_target and target else own)
    model.load_weights(
        [(name, mx.zeros(wanted[name], MLX_TYPES[tensors[name].dtype])) for name in wanted]
    )
    plain = dict(model.named_modules())
    if quantisation is not None:
        model, config = quantise(model, config, quantisation)
    if target is not None:
        config = {**config, "torch_dtype": target, "dtype": target}
    return BasePlan(model, config, tuple(_written(model, plain, tensors)))


def _check_types(
    weights: Mapping[str, Tensor], parameters: Mapping[str, mx.array], path: Path
) -> None:
    """Make sure that floats stand where the model computes with floats, and packed words where with those."""
    for name, tensor in weights.items():
        wanted = parameters.get(name)
        if wanted is not None and tensor.is_float != mx.issubdtype(wanted.dtype, mx.floating):
            kind = "whole numbers" if tensor.is_float else "floats"
            raise CheckpointError(
                f"{path}: {shown(tensor.origin)} is {tensor.dtype}, expected {kind}; take the "
                "model's weights in 16 or 32 bits."
            )


def _check_deltas(
    deltas: Mapping[str, LoraPair], weights: Mapping[str, Tensor], path: Path
) -> None:
    """Make sure that every LoRA product has a weight of its shape to be added to."""
    for name, (a, b, _) in deltas.items():
        weight = weights.get(name)
        if weight is None:
            raise CheckpointError(
                f"{path}: the adapter changes {shown(name)}, which mlx-lm keeps in another form; "
                "merge the adapter in PEFT (merge_and_unload) and convert the result."
            )
        if weight.shape != (b.shape[1], a.shape[0]):
            raise CheckpointError(
                f"{path}: the adapter changes {shown(name)} by {(b.shape[1], a.shape[0])}, and the "
                f"base's is {weight.shape}; give the base that the adapter was trained on."
            )


def _stated_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the float type a config names, as `bfloat16` or `torch.bfloat16`."""
    for value in (config.get("torch_dtype"), config.get("dtype")):
        if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
            return value.removeprefix("torch.")
    return None


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by full name."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))


def build_model(config: dict[str, Any], path: Path) -> nn.Module:
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
            f"{path}: mlx-lm has no model of the type {shown(config['model_type'])}; update mlx-lm."
        ) from None
    try:
        model: nn.Module = model_class(arguments_class.from_dict(config))
    except Exception as error:  # whatever mlx-lm's model classes do with fields that make no sense
        raise CheckpointError(
            f"{path}: config.json does not describe a {config['model_type']} model ({brief(error)})."
        ) from None
    if "quantization" in config:
        give_quantised_layers(model, config, path)
    return model


def _with_tying(
    config: dict[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Say whether the head is tied where the config does not: mlx-lm would drop a head unasked.

    Of a tied head a copy is left out, which families without a head of their own would not know.

    Raises:
        CheckpointError: the config says so, and there is a head of other values.
    """
    stated = config.get("tie_word_embeddings")
    if "tie_word_embeddings" in config and stated is not True:
        return config, tensors
    head, embedding = (
        next((tensor for name, tensor in tensors.items() if name.endswith(f"{end}.weight")), None)
        for end in ("lm_head", "embed_tokens")
    )
    tied = head is None or (embedding is not None and _same_values(head, embedding))
    if stated and not tied:
        raise CheckpointError(
            f"{path}: config.json ties the head to the token embeddings, and lm_head.weight holds "
            "other values; set tie_word_embeddings to false to use them, or drop them with --rules."
        )
    if tied:
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not head}
    return {**config, "tie_word_embeddings": tied}, tensors


def _same_values(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    is_one = one.start is not None and one.start == other.start
    if is_one and one.sources[0][0] == other.sources[0][0]:
        return True
    return np.array_equal(one.read(), other.read())


def _sanitised(model: nn.Module, fitted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Let mlx-lm rename and drop weights, on placeholders; real arrays only if it computes."""
    sanitize = getattr(model, "sanitize", None)
    if sanitize is None:
        return dict(fitted)
    placeholders = {
        name: mx.zeros(tensor.shape, MLX_TYPES[tensor.dtype]) for name, tensor in fitted.items()
    }
    known = {id(value): name for name, value in placeholders.items()}
    try:
        result = sanitize(dict(placeholders))
        if not all(id(value) in known for value in result.values()):
            result = sanitize({name: _lazy(tensor) for name, tensor in fitted.items()})
            return {name: Tensor.of_mlx(name, value) for name, value in result.items()}
        return {name: fitted[known[id(value)]].renamed(name) for name, value in result.items()}
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: mlx-lm cannot bring these weights into its own form ({type(error).__name__}:"
            f" {brief(error)}); check that config.json belongs to them."
        ) from None


def _lazy(tensor: Tensor) -> mx.array:
    """Return a tensor that is read when it is computed: MLX reads safetensors files so."""
    path, name = tensor.sources[0]
    if tensor.start is not None and path.suffix == ".safetensors":
        loaded = mx.load(str(path))
        if isinstance(loaded, dict) and name in loaded:
            return loaded[name]
    return to_mlx(tensor.read(), tensor.dtype)


def _written(
    model: nn.Module, plain: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> list[Tensor]:
    """Return the tensors in the model's order; a newly quantised layer's weight makes several."""
    specs = {
        name: TensorSpec(name, dtype_name(value.dtype), tuple(value.shape))
        for name, value in parameters(model).items()
    }
    modules = dict(model.named_modules())
    written = []
    for name in specs:
        if (tensor := tensors.get(name)) is None:
            continue  # scales and biases, parts of the weight before them
        path = name.rpartition(".")[0]
        layer = modules.get(path) if name.endswith(".weight") else None
        if layer is not None and hasattr(layer, "scales") and not hasattr(plain[path], "scales"):
            names = (f"{path}.{part}" for part in ("weight", "scales", "biases"))
            tensor = tensor.quantised(tuple(specs[part] for part in names if part in specs), layer)
        written.append(tensor)
    return written
