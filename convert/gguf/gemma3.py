"""What config.json of a Gemma 3 text model has beside the usual.

Files of this family leave out what is the same in all its models; the figures are those of Gemma 3
(Gemma Team, 2025, arXiv 2503.19786, §2 and table 1): five layers with a sliding window to one without, which
rotate by a base of their own, and queries scaled by their width, in the 27B model by width / heads.
"""

from __future__ import annotations

from typing import Any

from .file import GGUFFile
from .sizes import Sizes, refused

GEMMA3_KEYS = frozenset(
    {
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "rope.freq_base_swa",
    }
)
_PATTERN = 6
_LOCAL_BASE = 10000.0
_LAYERS_OF_27B = 62


def gemma3_config(gguf: GGUFFile, sizes: Sizes) -> dict[str, Any]:
    """Return the entries of config.json that only this family has.

    Raises:
        CheckpointError: windows of another pattern, or heads of another width where they slide.
    """
    pattern = gguf.integer("gemma3.attention.sliding_window_pattern", _PATTERN)
    if pattern < 2:
        raise refused(gguf, f"gemma3.attention.sliding_window_pattern is {pattern}")
    for key in ("attention.key_length_swa", "attention.value_length_swa"):
        if gguf.integer(f"gemma3.{key}", sizes.head_dim) != sizes.head_dim:
            raise refused(gguf, f"gemma3.{key} differs from the heads' width {sizes.head_dim}")
    wide = sizes.layers == _LAYERS_OF_27B
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": sizes.width // sizes.heads if wide else sizes.head_dim,
        "sliding_window": gguf.integer("gemma3.attention.sliding_window"),
        "sliding_window_pattern": pattern,
        "rope_local_base_freq": gguf.number("gemma3.rope.freq_base_swa", _LOCAL_BASE),
    }
