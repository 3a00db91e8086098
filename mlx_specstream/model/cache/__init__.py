"""The KV cache of a decoder whose passes write more rows than they keep.

    rows     0 ............ length | length ........ length + R | ........ capacity
             committed text        | rows of the running pass   | free

A pass appends the keys and values of all its rows behind the committed text (draft nodes, then
stream rows); attention reads up to there under a mask. Once the host knows the accepted path,
`commit` moves its rows into place, as a part of the next graph, and `advance` moves the end of
the committed text. Everything behind it is scratch that the next pass overwrites: a rejected draft
or a stream is never part of the cache, and never costs a row that is still needed.

| file | the idea it holds |
|---|---|
| `rows.py` | one layer's growing buffers, and what a layer of mlx-lm sees of them during a pass |
| `rotating.py` | layers that see the first rows and a window of recent ones |
| `quantized.py` | layers whose rows are stored in a few bits |
| `state.py` | layers whose every token overwrites a state |
| `kv.py` | all layers together: commit, advance, rewind, turning quantised on the way |
| `kinds.py` | which kinds of layers a model and a `CacheConfig` ask for |
| `mlx_lm.py` | the same rows as mlx-lm's own cache objects hold them |
| `files.py` | prompt caches on disk, in mlx-lm's format |
"""

from .kinds import new_cache
from .kv import Companion, KVCache, PassCache
from .mlx_lm import as_mlx_lm, from_mlx_lm, to_mlx_lm
from .quantized import QuantizedLayer, QuantizedPass
from .rotating import SLACK, RotatingLayer
from .rows import GROWTH, LayerKV, LayerPass, LayerView, OnValues, Span
from .state import StateLayer

__all__ = [
    "GROWTH",
    "SLACK",
    "Companion",
    "KVCache",
    "LayerKV",
    "LayerPass",
    "LayerView",
    "OnValues",
    "PassCache",
    "QuantizedLayer",
    "QuantizedPass",
    "RotatingLayer",
    "Span",
    "StateLayer",
    "as_mlx_lm",
    "from_mlx_lm",
    "new_cache",
    "to_mlx_lm",
]
