"""Speculative Streaming on MLX: the same words in fewer passes of the model.

    from mlx_specstream import load, generate
    model, tokenizer = load("demo")
    print(generate(model, tokenizer, prompt="Why is the sky blue?"))

The names below are imported when first used, so that `specstream --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from .machine import blas as _blas

if TYPE_CHECKING:
    from .batch.decode import BatchDecoder as BatchDecoder
    from .batch.generation import batch_generate as batch_generate
    from .config import DecodeConfig as DecodeConfig
    from .config import PruneSpec as PruneSpec
    from .config import StreamConfig as StreamConfig
    from .config import TreeSpec as TreeSpec
    from .config import TypicalSpec as TypicalSpec
    from .errors import SpecStreamError as SpecStreamError
    from .generation.generate import generate as generate
    from .generation.generate import stream_generate as stream_generate
    from .generation.response import GenerationResponse as GenerationResponse
    from .loading.load import StreamModel as StreamModel
    from .loading.load import load as load
    from .model.cache import KVCache as KVCache

__version__ = "0.1.0"

_blas.install()  # before MLX computes, whichever module is imported first

_HOMES = {
    "BatchDecoder": "batch.decode",
    "DecodeConfig": "config",
    "GenerationResponse": "generation.response",
    "KVCache": "model.cache",
    "PruneSpec": "config",
    "SpecStreamError": "errors",
    "StreamConfig": "config",
    "StreamModel": "loading.load",
    "TreeSpec": "config",
    "TypicalSpec": "config",
    "batch_generate": "batch.generation",
    "generate": "generation.generate",
    "load": "loading.load",
    "stream_generate": "generation.generate",
}

_PACKAGES = ("convert",)  # may be called without an import of its own

__all__ = [
    "BatchDecoder",
    "DecodeConfig",
    "GenerationResponse",
    "KVCache",
    "PruneSpec",
    "SpecStreamError",
    "StreamConfig",
    "StreamModel",
    "TreeSpec",
    "TypicalSpec",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> object:
    """Import the module behind a public name."""
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _from_generate(name: str) -> object:
    """Return what `mlx_lm.generate` has under this name, our own where there is one."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name in _HOMES:
        return __getattr__(name)
    return getattr(importlib.import_module("mlx_lm.generate"), name)


# `mlx_specstream.generate` is the function; `from mlx_specstream.generate import ...` works as well.
_generate = ModuleType(f"{__name__}.generate", "The names of mlx_lm.generate.")
vars(_generate)["__getattr__"] = _from_generate
sys.modules[_generate.__name__] = _generate
