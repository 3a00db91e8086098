"""Checkpoints in: what people have, turned into mlx-lm folders and stream weights.

The package can be called, because `from mlx_lm import convert` is a function there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Convert a checkpoint as `specstream convert` does; the arguments are mlx-lm's.

    Raises:
        OptionError: an argument that cannot be used.
        CheckpointError: the checkpoint cannot be read.
    """
    from ..errors import OptionError
    from .cli import main

    if trust_remote_code or dequantize or callable(quant_predicate):
        raise OptionError(
            "convert takes no trust_remote_code (code of a model is never run), no dequantize (use "
            "mlx_lm.convert for that) and no function as quant_predicate (name one of its recipes)."
        )
    options = {
        "--hf-path": hf_path,
        "--mlx-path": mlx_path,
        "--q-group-size": q_group_size,
        "--q-bits": q_bits,
        "--q-mode": q_mode if quantize else None,
        "--dtype": dtype,
        "--upload-repo": upload_repo,
        "--revision": revision,
        "--quant-predicate": quant_predicate,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    main([*words, *(["-q"] if quantize else [])])


class _Callable(ModuleType):
    """A package that is its own function."""

    def __call__(self, *arguments: Any, **options: Any) -> None:
        convert(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
