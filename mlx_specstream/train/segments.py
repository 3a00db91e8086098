"""Segment attention: stream rows in small groups of positions, exact and without waste [SS App. C].

All streams of a text in one attention would score n·γ rows against n·γ stream keys of which each
row may see at most γ. Instead the positions are cut into segments of P; each segment is an entry
of the batch, sees the main stream's keys of its text and its own P·γ stream keys, and knows
nothing of other segments:

    text   x0 x1 x2 │ x3 x4 │ x5 x6        keys of segment 2:  main 0..6 │ x5¹ x5² x6¹ x6²
                    segment 1  segment 2   rows of segment 2:             x5¹ x5² x6¹ x6²

Stream rows never look at other positions' streams, so this is the same sum in other words. Only
as many segments as one pass takes are in memory at a time; gradients of passes add up.

The layers are the engine's: `Streams.run` with a cache whose main rows are given and a mask for
every segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..model.cache import KVCache, LayerKV
from ..model.masks import RowMask, among_streams
from ..speculation.streams import Streams
from .base import BaseStates, KeptRows


@dataclass(frozen=True)
class Segments:
    """Groups of positions of a batch's texts, on the host.

    text: (n,) which text of the batch. positions: (n, P), ascending, the last one repeated to
    fill up. valid: (n, P) bool, false for what only fills up.
    """

    text: np.ndarray
    positions: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, part: slice) -> Segments:
        return Segments(self.text[part], self.positions[part], self.valid[part])

    @property
    def num_keys(self) -> int:
        """Return how many main rows the furthest position looks back on, itself included."""
        return int(self.positions.max()) + 1


def cut(positions: Sequence[Sequence[int]], size: int) -> Segments:
    """Cut each text's positions into segments of `size`, those that end early first.

    Sorting by their last position keeps the main keys short that a pass has to hold.
    """
    text, places, valid = [], [], []
    for number, own in enumerate(positions):
        for start in range(0, len(own), size):
            part = list(own[start : start + size])
            missing = size - len(part)
            text.append(number)
            places.append(part + part[-1:] * missing)
            valid.append([True] * len(part) + [False] * missing)
    order = np.argsort([p[-1] for p in places], kind="stable")
    return Segments(
        np.array(text, dtype=np.int32)[order],
        np.array(places, dtype=np.int32).reshape(-1, size)[order],
        np.array(valid, dtype=bool).reshape(-1, size)[order],
    )


class SegmentKeys(KeptRows):
    """One layer's keys: the given main rows of each segment's text, then the segment's own rows."""

    def __init__(self, main_keys: mx.array, main_values: mx.array) -> None:
        super().__init__()
        self.main = (main_keys, main_values)

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        pairs = zip(self.main, super().read(end), strict=True)
        keys, values = (mx.concatenate([main, own], axis=2) for main, own in pairs)
        return keys, values


@dataclass(frozen=True)
class SegmentRows:
    """The rows of segments: their RoPE positions (n, R) and who sees whom, (n, 1, R, S) bool."""

    positions: mx.array
    mask: RowMask


def segment_rows(
    positions: mx.array, num_keys: int, streams: Streams, first: mx.array | None = None
) -> SegmentRows:
    """Return the stream rows of segments (n, P), over `num_keys` main keys and their own P·γ keys.

    Row (t, j) sees the main stream up to t and streams 1..j of the same t [SS Eq. 2].

    first: (n,), where main rows stand before the stream rows, P of each segment (shared mode): the
    position from which on main row t sees the streams of t.
    """
    n, P = positions.shape
    G = streams.num_streams
    main_keys = mx.arange(num_keys, dtype=mx.int32)
    causal = main_keys <= positions[..., None]
    to_main = [mx.repeat(causal, G, axis=1)]
    to_streams = [mx.broadcast_to(among_streams(P, G), (n, P * G, P * G))]
    later = streams.positions(positions.reshape(-1)).reshape(n, P * G)
    rows = [later]
    if first is not None:
        itself = mx.repeat(mx.eye(P, dtype=mx.bool_), G, axis=1)
        to_main.insert(0, causal)
        to_streams.insert(0, itself & (positions >= first[:, None])[..., None])
        rows.insert(0, positions)
    parts = [mx.concatenate(part, axis=1) for part in (to_main, to_streams)]
    seen = mx.concatenate(parts, axis=2)[:, None]
    at = mx.concatenate(rows, axis=1)
    keys = mx.concatenate([mx.broadcast_to(main_keys, (n, num_keys)), later], axis=1)
    return SegmentRows(at, RowMask(seen, lambda: (at[:, None], keys[:, None])))


def stream_states(streams: Streams, base: BaseStates, segments: Segments) -> mx.array:
    """Return the final normed hidden states of all stream rows, (n, P, γ, h).

    Gradients reach the stream weights alone: main rows are constants here.
    """
    n, P = segments.positions.shape
    G, h, S = streams.num_streams, base.first.shape[-1], segments.num_keys
    text, positions = mx.array(segments.text), mx.array(segments.positions)
    # Behind a text's last position, where no stream has a target, any token will do.
    following = mx.minimum(positions + 1, base.tokens.shape[1] - 1)
    starts = streams.start(
        base.first[text[:, None], positions].reshape(1, n * P, h),
        base.tokens[text[:, None], following].reshape(1, n * P),
    )
    rows = segment_rows(positions, S, streams)
    cache = KVCache(0)
    cache.layers = [LayerKV() for _ in range(base.first_msa)]
    for keys, values in zip(base.keys, base.values, strict=True):
        cache.layers.append(
            SegmentKeys(
                mx.take(keys, text, axis=0)[:, :, :S], mx.take(values, text, axis=0)[:, :, :S]
            )
        )
    hidden = starts.reshape(n, P * G, h)
    hidden = streams.run(hidden, 0, streams.upper, cache, 0, rows.positions, rows.mask)
    return streams.backbone.norm(hidden).reshape(n, P, G, h)
