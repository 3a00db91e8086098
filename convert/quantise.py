"""Which layers of a model are quantised, and how: as its config lists, or as mlx-lm chooses.

Works on a model whose parameters are placeholders that are never computed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import CheckpointError, OptionError, brief


@dataclass(frozen=True)
class Quantisation:
    """How to quantise: mlx-lm's settings. `None`: the mode's own default."""

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    predicate: str | None = None


def give_quantised_layers(model: nn.Module, config: dict[str, Any], path: Path) -> None:
    """Give a model the quantised layers that its config (an mlx-lm folder's) lists.

    Raises:
        CheckpointError: the config's quantization does not fit the model.
    """
    settings = config["quantization"]
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: config.json's quantization must be an object.")
    default = {name: settings[name] for name in ("group_size", "bits", "mode") if name in settings}

    def choose(name: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        own = settings.get(name, True)
        return {**default, **own} if isinstance(own, dict) else bool(own)

    try:
        nn.quantize(model, **default, class_predicate=choose)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: config.json's quantization does not fit: {error}."
        ) from None


def quantise(
    model: nn.Module, config: dict[str, Any], wanted: Quantisation
) -> tuple[nn.Module, dict[str, Any]]:
    """Let mlx-lm choose which layers become quantised; return the model and its config.

    Raises:
        OptionError: it is quantised already, or mlx has no such quantisation.
    """
    from mlx_lm.utils import quantize_model

    if "quantization" in config:
        raise OptionError("the base is quantised already; leave out -q, or give full weights.")
    predicate = None
    try:
        if wanted.predicate:
            if wanted.mode != "affine":
                raise OptionError("--quant-predicate works with --q-mode affine only.")
            builder = importlib.import_module("mlx_lm.convert").mixed_quant_predicate_builder
            predicate = builder(wanted.predicate, model, wanted.group_size or 64)
        with contextlib.redirect_stdout(io.StringIO()):
            made, config = quantize_model(
                model,
                config,
                wanted.group_size,
                wanted.bits,
                wanted.mode,
                quant_predicate=predicate,
            )
    except (ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"this quantisation is not possible: {brief(error)}.") from None
    if not any(hasattr(module, "scales") for _, module in made.named_modules()):
        raise OptionError(
            f"no layer can be quantised in groups of {config['quantization']['group_size']}: "
            "no width is a multiple of it; give a smaller --q-group-size."
        )
    return made, config
