"""Plain decoding of many prompts at once: slots that are refilled as answers finish.

    slot 0  [prompt a | answer a ....]
    slot 1  [prompt b | ans b]            ──►  [prompt e | answer e ...]

One matrix product serves all slots. Each slot has its own length: its row is written at its own
place of the buffers, rotated by its own position, and sees its own keys alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx
import numpy as np

from ..model.backbone import Backbone
from ..model.cache import GROWTH, KVCache, LayerKV, Span
from ..model.masks import Mask, RowMask, causal_mask
from .base import embed_texts, kept_rows, pad_texts


@dataclass(frozen=True)
class Waiting:
    """A prompt in the queue."""

    index: int
    tokens: list[int]


@dataclass
class Slot:
    """A sequence being answered; `length` tokens of it are in the buffers."""

    index: int
    length: int
    answer: list[int] = field(default_factory=list)


class SlotRows(LayerKV):
    """One layer's buffers (B, K, capacity, D); a pass writes one row a slot, at `places` (B,)."""

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.places = mx.zeros((keys.shape[0],), dtype=mx.int32)
        self.end = 0

    def write(self, at: int, keys: mx.array, values: mx.array) -> None:
        del at
        assert self.keys is not None
        assert self.values is not None
        slots = mx.arange(keys.shape[0])
        self.keys[slots, :, self.places] = keys[:, :, 0]
        self.values[slots, :, self.places] = values[:, :, 0]

    def read(self, end: int) -> tuple[mx.array, mx.array]:
        del end  # of a pass of one row at 0; these rows lie further on
        return super().read(self.end)


class SlotMask(RowMask):
    """Each slot sees its own keys up to its position: (B, 1, 1, S) bool."""

    def __init__(self, positions: mx.array, end: int) -> None:
        keys = mx.arange(end, dtype=mx.int32)
        super().__init__(None, lambda: (positions, keys))
        self.rows, self.keys = positions[:, None], keys

    def of(self, window: int | None, span: Span | None = None) -> Mask:
        assert span is None
        seen = self.keys <= self.rows
        if window is not None:
            seen = seen & (self.keys > self.rows - window)
        return seen[:, None, None]


@dataclass
class BatchDecoder:
    """Answers prompts greedily, or at a temperature with a seed per prompt."""

    backbone: Backbone
    batch_size: int
    max_tokens: int
    stop: Collection[int]
    temp: float = 0.0
    top_p: float = 0.0
    seed: int = 0
    slots: list[Slot] = field(default_factory=list)
    layers: list[SlotRows] = field(default_factory=list)
    last: list[int] = field(default_factory=list)

    def answers(self, prompts: Sequence[Waiting]) -> Iterator[tuple[int, list[int]]]:
        """Yield (index, answer) as answers are finished, in any order."""
        queue = list(reversed(prompts))
        refill = max(1, self.batch_size // 8)
        while queue or self.slots:
            room = self.batch_size - len(self.slots)
            if queue and (room >= refill or not self.slots):
                self._fill([queue.pop() for _ in range(min(room, len(queue), self.batch_size))])
            else:
                self._step()
            yield from self._finished()

    def _fill(self, prompts: Sequence[Waiting]) -> None:
        """Prefill prompts side by side and give each a slot."""
        tokens = pad_texts([prompt.tokens for prompt in prompts])
        cache = kept_rows(self.backbone.num_layers)
        hidden = embed_texts(self.backbone, tokens)
        every = range(self.backbone.num_layers)
        mask = causal_mask(0, tokens.shape[1])
        hidden = self.backbone.run(hidden, every, cache, 0, 0, mask)
        ends = mx.array([len(prompt.tokens) - 1 for prompt in prompts])
        hidden = hidden[mx.arange(len(prompts)), ends][:, None]
        new = [Slot(prompt.index, len(prompt.tokens)) for prompt in prompts]
        chosen = self._choose(hidden, new)
        rows = [layer.read(tokens.shape[1]) for layer in cache.layers]
        needed = max(slot.length for slot in [*self.slots, *new]) + self.max_tokens
        self._join(rows, -(-needed // GROWTH) * GROWTH)
        self.slots += new
        self.last += chosen

    def _join(self, rows: Sequence[tuple[mx.array, mx.array]], capacity: int) -> None:
        """Put the prefilled rows (n, K, L, D) below those of the slots that are there."""
        joined = []
        for number, pair in enumerate(rows):
            old = self.layers[number] if self.layers else None
            parts = []
            for array, have in zip(
                pair, (old.keys, old.values) if old else (None, None), strict=True
            ):
                stack = [_widened(array, capacity)]
                if have is not None:
                    stack.insert(0, _widened(have, capacity))
                parts.append(mx.concatenate(stack))
            joined.append(SlotRows(*parts))
        self.layers = joined
        mx.eval([(layer.keys, layer.values) for layer in joined])

    def _step(self) -> None:
        """Decode one token in every slot."""
        places = mx.array([slot.length for slot in self.slots], dtype=mx.int32)
        end = max(slot.length for slot in self.slots) + 1
        cache = KVCache(0)
        cache.layers = list(self.layers)
        for layer in self.layers:
            layer.places, layer.end = places, end
        tokens = mx.array(self.last, dtype=mx.int32)[:, None]
        hidden = embed_texts(self.backbone, tokens)
        every = range(self.backbone.num_layers)
        hidden = self.backbone.run(hidden, every, cache, 0, places, SlotMask(places, end))
        for slot in self.slots:
            slot.length += 1
        self.last = self._choose(hidden, self.slots)

    def _choose(self, hidden: mx.array, slots: Sequence[Slot]) -> list[int]:
        """Draw each slot's next token from hidden states (B, 1, h) and note it."""
        logits = self.backbone.head(self.backbone.norm(hidden))[:, 0].astype(mx.float32)
        if self.temp > 0:
            keys = [mx.random.key(hash_of(self.seed, s.index, len(s.answer))) for s in slots]
            drawn = mx.stack([self._draw(row, key) for row, key in zip(logits, keys, strict=True)])
        else:
            drawn = mx.argmax(logits, axis=-1)
        chosen = cast(list[int], drawn.tolist())
        for slot, token in zip(slots, chosen, strict=True):
            slot.answer.append(token)
        return chosen

    def _draw(self, logits: mx.array, key: mx.array) -> mx.array:
        """Sample a token () from one row of logits (V,)."""
        logits = logits / self.temp
        if 0 < self.top_p < 1:
            order = mx.argsort(-logits)
            ordered = mx.take(logits, order)
            before = mx.cumsum(mx.softmax(ordered)) - mx.softmax(ordered)
            ordered = mx.where(before < self.top_p, ordered, -mx.inf)
            return mx.take(order, mx.random.categorical(ordered, key=key))
        return mx.random.categorical(logits, key=key)

    def _finished(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the answers that have ended and give up their slots."""
        keep = []
        for place, slot in enumerate(self.slots):
            if slot.answer[-1] in self.stop or len(slot.answer) >= self.max_tokens:
                yield slot.index, slot.answer
            else:
                keep.append(place)
        if len(keep) == len(self.slots):
            return
        self.slots = [self.slots[place] for place in keep]
        self.last = [self.last[place] for place in keep]
        if not keep:
            self.layers = []
            return
        index = mx.array(keep)
        for layer in self.layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys = mx.take(layer.keys, index, axis=0)
            layer.values = mx.take(layer.values, index, axis=0)


def hash_of(seed: int, index: int, place: int) -> int:
    """Return a seed for one draw: the same however prompts are batched."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, index, place]).generate_state(1, np.uint64)
    return int(state[0])


def _widened(array: mx.array, capacity: int) -> mx.array:
    """Return (B, K, L, D) cut or padded to `capacity` rows."""
    if array.shape[2] >= capacity:
        return array[:, :, :capacity]
    return mx.pad(array, [(0, 0), (0, 0), (0, capacity - array.shape[2]), (0, 0)])
