"""Models of tiny configs, with weights under which a wrong mask, position or norm shows."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_specstream.errors import ModelError
from tests.support.tiny_models.own import OWN, WITHOUT_ROPE_PARAMETERS, WRAPPED
from tests.support.tiny_models.sizes import SIZES, Config

MOST_PARAMETERS = 2_000_000
RUN_BY_IMPORT = ("olmo",)  # ends the program where another package is missing


def family_modules() -> list[str]:
    """Return the names of mlx-lm's model modules that hold a model, sorted.

    `RUN_BY_IMPORT` is named without being imported.
    """
    import mlx_lm.models

    names = sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if name in RUN_BY_IMPORT or _has_model(name)]


def _has_model(name: str) -> bool:
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return hasattr(module, "Model") and hasattr(module, "ModelArgs")


def tiny_config(name: str, **overrides: Any) -> Config:
    """Return the config of a tiny model of a family, by the name of its mlx-lm module."""
    if name not in WRAPPED:
        return {**SIZES, "model_type": name, **OWN.get(name, {}), **overrides}
    inner = tiny_config(WRAPPED[name], **overrides)
    inner["rope_parameters"] = (
        None
        if name in WITHOUT_ROPE_PARAMETERS
        else {**SIZES["rope_parameters"], "partial_rotary_factor": 0.5}
    )
    if name == "qwen3_5":  # experts belong to qwen3_5_moe
        inner["num_experts"] = 0
    return {"model_type": name, "text_config": inner, "vocab_size": SIZES["vocab_size"]}


def tiny_random_model(name: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a float32 model of a family with weights that depend on `seed` alone.

    The global random state is left as it was.

    Raises:
        ModelError: the config makes a model that is not tiny, so the tables lack one of its words.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = tiny_config(name, **overrides)
    if dataclasses.is_dataclass(module.ModelArgs):
        names = {field.name for field in dataclasses.fields(module.ModelArgs)}
        config = {key: value for key, value in config.items() if key in names}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    size = sum(array.size for _, array in flat)
    if size > MOST_PARAMETERS:
        raise ModelError(f"the table of sizes makes no tiny {name}: {size:,} parameters.")
    randomize(model, seed)
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Draw all weights of a model anew; the global random state is left as it was.

    Norms are not one, biases not zero, and logits spread over several units, so that rounding
    does not decide an argmax.
    """
    keys = iter(mx.random.split(mx.random.key(seed), len(tree_flatten(model.parameters()))))

    def drawn(path: str, old: mx.array) -> mx.array:
        noise = mx.random.normal(old.shape, key=next(keys))
        if "norm" in path:
            return 1 + 0.2 * noise
        if old.ndim == 1:
            return 0.2 * noise
        return noise / old.shape[-1] ** 0.5 * (2.0 if "embed" in path or "head" in path else 1.0)

    model.update(tree_map_with_path(drawn, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
