"""What was trained, and how to decode with it.

Frozen and validated when made: a config that exists is a config that makes sense on its own.
Whether it fits a particular base model is checked where the two meet (`streams.py`).

| file | the idea it holds |
|---|---|
| `bounds.py` | numbers as callers give them: of the right kind and within bounds |
| `streams.py` | `StreamConfig`: the trained streams, as `streams_config.json` describes them |
| `drafter.py` | `DrafterConfig`: trained heads or a layer that draft in place of streams |
| `tree.py` | `TreeSpec`: the shape of the draft trees, and how the command line says it |
| `decode.py` | `DecodeConfig`: tree, pruning, schedule and acceptance of a run |
| `sampling.py` | `SamplingConfig`: temperature, samplers, penalties and their bounds |
| `cache.py` | `CacheConfig`: how many rows a new KV cache holds, and in how many bits |
"""

from .cache import CacheConfig
from .decode import DRAFTS, DecodeConfig, PruneSpec, Schedule, TypicalSpec, parse_drafts
from .drafter import DrafterConfig, DrafterKind, LayerConfig
from .sampling import SamplingConfig
from .streams import AUTO, FORMAT_VERSION, MAX_STREAMS, Mode, RopeOffset, StreamConfig
from .tree import TreeKind, TreeSpec

__all__ = [
    "AUTO",
    "DRAFTS",
    "FORMAT_VERSION",
    "MAX_STREAMS",
    "CacheConfig",
    "DecodeConfig",
    "DrafterConfig",
    "DrafterKind",
    "LayerConfig",
    "Mode",
    "PruneSpec",
    "RopeOffset",
    "SamplingConfig",
    "Schedule",
    "StreamConfig",
    "TreeKind",
    "TreeSpec",
    "TypicalSpec",
    "parse_drafts",
]
