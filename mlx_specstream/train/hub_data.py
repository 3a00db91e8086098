"""Records of a data set on the Hugging Face hub, read by the `datasets` package as mlx-lm does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import DataError, brief

SPLIT_NAMES = {"valid": ("valid", "validation")}
"""What the hub calls our splits, where that differs."""


def hub_rows(name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield a split's records, each with where it stands; nothing if there is no such split.

    Raises:
        DataError: no name of a data set, the package is missing, or the data set cannot be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DataError(
            f"there is no data at {name}; name a .jsonl file, a folder with train.jsonl, or a data "
            "set on the Hugging Face hub as owner/name."
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"there is no data at {name} here, and data sets from the Hugging Face hub need the "
            "package datasets: pip install datasets."
        ) from None
    try:
        loaded = load_dataset(name)
    except Exception as error:  # whatever datasets, the hub or the network raise
        raise DataError(
            f"the data set {name} could not be fetched ({brief(error)}); check the name and "
            "the network; what was fetched is kept and continued next time."
        ) from error
    for theirs in SPLIT_NAMES.get(split, (split,)):
        if theirs in loaded:
            for number, fields in enumerate(loaded[theirs], start=1):
                yield dict(fields), f"{name} {theirs}, record {number}"
            return
