"""Prompt caches on disk, in mlx-lm's own format: what either writes, the other reads.

mlx-lm's functions of the installed version do the writing and reading, so a file is as
interchangeable as mlx-lm's are among themselves. The rows are all of the prompt's; what is said
next comes behind them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from ...errors import DataError, OptionError
from ...weights.files import atomic_file
from .kv import KVCache
from .mlx_lm import as_mlx_lm, from_mlx_lm
from .quantized import Quantization, QuantizedLayer


def save_prompt_cache(path: str | Path, cache: KVCache, model: str) -> None:
    """Write the committed rows as `mlx_lm.cache_prompt` does; `model`: what mlx-lm loads.

    Raises:
        OptionError: the name does not end in .safetensors.
        OutputError: the file cannot be written.
    """
    from mlx_lm.models import cache as mlx_lm_cache

    if Path(path).suffix != ".safetensors":
        raise OptionError(f"a prompt cache is a .safetensors file, got {path}.")
    metadata = {"model": model, "tokenizer_config": json.dumps({"trust_remote_code": False})}
    with atomic_file(path, if_exists="replace") as partial:
        mlx_lm_cache.save_prompt_cache(str(partial), as_mlx_lm(cache), metadata)


def load_prompt_cache(
    path: str | Path,
    windows: Sequence[int | None],
    quantize: Quantization | None = None,
) -> tuple[KVCache, dict[str, str]]:
    """Return a file's rows and its metadata (`model`, `tokenizer_config`).

    Args:
        windows: the sliding windows of the model's layers.
        quantize: how rows are to be stored; what is stored quantised must be so already.

    Raises:
        DataError: the file is missing, damaged, or no prompt cache.
        OptionError: it does not fit the model or `quantize`.
    """
    from mlx_lm.models import cache as mlx_lm_cache

    if not Path(path).is_file():
        raise DataError(f"there is no prompt cache {path}; make one with specstream cache_prompt.")
    try:
        caches, metadata = mlx_lm_cache.load_prompt_cache(str(path), return_metadata=True)
        metadata = {str(key): str(value) for key, value in dict(metadata).items()}
        mx.eval([cache.state for cache in caches])
    except Exception as error:  # whatever mlx and mlx-lm raise at foreign bytes
        raise DataError(
            f"{path} is not a prompt cache that this version of mlx-lm reads; write it again with "
            "specstream cache_prompt or mlx_lm.cache_prompt."
        ) from error
    if len(caches) != len(windows):
        raise OptionError(
            f"the prompt cache {path} has {len(caches)} layers and the model {len(windows)}; it "
            "was made for another model."
        )
    cache = from_mlx_lm(caches, windows, quantize)
    packed = [layer for layer in cache.layers if isinstance(layer, QuantizedLayer)]
    stored = {(layer.bits, layer.group_size) for layer in packed}
    if quantize is not None and stored - {(quantize.bits, quantize.group_size)}:
        bits, group_size = stored.pop()
        raise OptionError(
            f"the prompt cache {path} has {bits} bits in groups of {group_size}; ask for the same "
            "kv_bits and kv_group_size, or for none."
        )
    return cache, metadata


def check_model(metadata: Mapping[str, str], names: Sequence[str], path: str | Path) -> None:
    """Refuse a prompt cache of another model, as mlx-lm does.

    Raises:
        OptionError: the file names none of `names`.
    """
    made_with = metadata.get("model")
    if made_with is not None and made_with not in names:
        raise OptionError(
            f"the prompt cache {path} was made with the model {made_with}, not {names[0]}; name "
            "that model with --model."
        )
