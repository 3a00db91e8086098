"""Drafters with a cache of their own: what they have read of the text, in step with the base's.

    own rows   0 .......... n | the accepted path, padded | what drafts of it read
               committed text | P = depth + 1 rows        | scratch

A row is made of one token of the text, or of the base's features at it, or of both. A step's path is
read as a chain of fixed length of which the device alone knows how many rows count. What `commit`
keeps are its first rows, which lie where they belong.

With text tokens x and features f of positions p, the rows that are known before a step on root
x_L, and those after a prompt of T tokens has been read whose next token is not known yet:

                                    row p is made of    before the step    after the prompt
    EAGLE (`needs_next`)            x_{p+1}, f_p        p < L              p < T - 1
    a draft model (`reads_root`)    x_p                 p <= L             p < T
    Hydra++'s layer                 f_p                 p < L              p < T

So at most one row is missing when a step begins, and it is made of the root: it goes before the path.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx

from ...model.cache import GROWTH, KVCache
from ...model.masks import RowMask, causal_mask
from ..accept import AcceptedPath
from ..result import Verdict
from .drafter import Drafter, Verified


@dataclass(eq=False)
class OwnRows:
    """A drafter's rows of the text in one KV cache of the base, whose companion it is.

    first: the text position of row 0, later than 0 where the drafter has not read the beginning;
    rows count their own positions, for what reads them looks at distances alone. kv: keys and
    values; its length counts the rows. features: (1, capacity, F), those of the text from `first`
    on, of which `known` are valid: the last row is made anew where the token after it changes.
    step_at: committed tokens when the step under way was built, -1 for none.
    """

    owner: OwnRowsDrafter
    kv: KVCache
    first: int = 0
    features: mx.array | None = None
    known: int = 0
    step_at: int = field(default=-1, repr=False)

    def follow(self, length: int) -> None:
        """Drop the rows of tokens beyond a text of `length`."""
        self.known = min(self.known, max(0, length - self.first))
        self.keep(length - self.first + self.owner.reads_root, length)

    def keep(self, rows: int, length: int) -> None:
        """Drop all but the first `rows`; where that cannot be, begin anew behind `length` tokens."""
        if rows >= self.kv.length:
            return
        if rows >= 0 and self.kv.can_rewind(rows):
            self.kv.rewind(rows)
        else:
            self.restart(length)

    def restart(self, length: int) -> None:
        """Begin anew, with no text before position `length`."""
        self.kv, self.first, self.known, self.step_at = self.kv.fresh(), length, 0, -1

    def line_up(self, length: int) -> None:
        """Keep the rows that a text of `length` tokens determines; begin anew if it has others."""
        self.step_at = -1
        rows = max(0, length - self.first - self.owner.needs_next)
        self.keep(rows, length)
        lacks_feature = self.owner.needs_next and self.known < length - self.first
        if self.kv.length < rows or lacks_feature:
            self.restart(length)

    def copy(self, length: int) -> OwnRows:
        """Return rows of their own for a copy of the cache, rewound to `length` tokens."""
        result = OwnRows(self.owner, self.kv.fresh(), length)
        rows = min(self.kv.length, length - self.first + self.owner.reads_root)
        if rows >= 0 and self.kv.can_rewind(rows):
            result.kv, result.first = self.kv.copy(rows), self.first
            result.known = min(self.known, max(0, length - self.first))
            if self.features is not None:
                result.features = self.features[:, : result.known]
        return result

    def note_features(self, at: int, features: mx.array) -> None:
        """Put features (1, R, F) of the text at its positions from `at` on."""
        start, R = at - self.first, features.shape[1]
        have = 0 if self.features is None else self.features.shape[1]
        if self.features is None or start + R > have:
            missing = -(-(start + R) // GROWTH) * GROWTH - have
            empty = mx.zeros((1, missing, features.shape[2]), dtype=features.dtype)
            before = [] if self.features is None else [self.features]
            self.features = mx.concatenate([*before, empty], axis=1)
        self.features[:, start : start + R] = features

    def last_feature(self, length: int) -> mx.array:
        """Return the features (1, 1, F) of the last of `length` text tokens."""
        assert self.features is not None
        at = length - self.first
        return self.features[:, at - 1 : at]


class RowPlace(NamedTuple):
    """Where new rows (R) go and what they see.

    kv: they go there, at `start`. positions: (R,) int32, or the first of consecutive ones. mask: over
    the cache's rows up to the last new one.
    """

    kv: KVCache
    start: int
    positions: int | mx.array
    mask: RowMask

    @classmethod
    def behind(cls, kv: KVCache, rows: int) -> RowPlace:
        """Return the place of consecutive rows behind those that count, each seeing those before."""
        n = kv.length
        return cls(kv, n, n, causal_mask(n, rows))


class PathRows(NamedTuple):
    """The rows of an accepted path: own rows, the states (1, P, h), and the place of the first."""

    own: OwnRows
    states: mx.array
    start: int


class OwnRowsDrafter(Drafter):
    """A drafter whose network reads rows of its own.

    needs_next: a row is made of the token after its features. reads_root: the token that no pass of
    the base has read yet has a row.
    """

    needs_next = False
    reads_root = False

    @abstractmethod
    def new_rows(self) -> KVCache:
        """Return an empty cache for the network's layers."""

    @abstractmethod
    def read_rows(self, tokens: mx.array, features: mx.array | None, place: RowPlace) -> mx.array:
        """Run the network over rows, which go to its cache; return states (1, R, h).

        tokens: (R,) int32. features: (1, R, F), of the base, or states of the network itself.
        """

    def features(self, verified: Verified) -> mx.array | None:
        """Return what the network takes from the base's rows, (1, m, F); None for nothing."""
        del verified
        return None

    @property
    def reads_prompts(self) -> bool:
        """Tell that prompts must be read."""
        return True

    def rows_of(self, cache: KVCache) -> OwnRows:
        """Return this drafter's rows beside a cache; new ones know no text before its end."""
        own = cache.companion
        if not isinstance(own, OwnRows) or own.owner is not self:
            own = OwnRows(self, self.new_rows(), cache.length)
            cache.companion = own
        return own

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Drop the row whose next token may be another now; begin anew behind text not read."""
        del prompt
        self.rows_of(cache).line_up(cache.length)

    def read(self, tokens: mx.array, verified: Verified, cache: KVCache) -> None:
        """Read consecutive tokens (R,) of a prompt, causally."""
        own, L, R = self.rows_of(cache), cache.length, tokens.shape[0]
        own.line_up(L)
        features = self.features(verified)
        if features is not None:
            before = own.last_feature(L) if self.needs_next and own.first < L else None
            own.note_features(L, features)
            own.known = L + R - own.first
            if self.needs_next:
                # The last token's own row waits for the token after it.
                features = features[:, :-1]
                if before is None:
                    tokens = tokens[1:]
                else:
                    features = mx.concatenate([before, features], axis=1)
        if rows := tokens.shape[0]:
            self.read_rows(tokens, features, RowPlace.behind(own.kv, rows))
            own.kv.advance(rows)
        # Started now: a long prompt's graph would hold every chunk until the first step.
        mx.async_eval(*own.kv.arrays, *([] if own.features is None else [own.features]))

    def read_path(self, verified: Verified, path: AcceptedPath, cache: KVCache) -> PathRows:
        """Read the accepted path, padding included, and the row before it that may be missing."""
        own, L = self.rows_of(cache), cache.length
        missing = L - own.first + self.reads_root - own.kv.length
        lacks_feature = self.needs_next and own.known < L - own.first
        if missing not in (0, 1) or lacks_feature:
            own.restart(L)
            missing = int(self.reads_root)
        tokens = mx.maximum(path.tokens, 0)  # padding may hold -1
        features = self.features(verified)
        if features is not None:
            features = mx.take(features, path.nodes, axis=1)
            before = own.last_feature(L) if missing else None
            own.note_features(L, features)
            if before is not None:
                features = mx.concatenate([before, features], axis=1)
        if missing:
            tokens = mx.concatenate([verified.tree.tokens[:1], tokens])
        place = RowPlace.behind(own.kv, tokens.shape[0])
        states = self.read_rows(tokens, features, place)
        own.step_at = L
        return PathRows(own, states[:, missing:], place.start + missing)

    def commit(self, verdict: Verdict, cache: KVCache) -> None:
        """Keep the path's rows, which are in place already."""
        super().commit(verdict, cache)
        own, L = self.rows_of(cache), cache.length
        if own.step_at == L:
            end = L + len(verdict.tokens) - own.first
            own.kv.advance(end + self.reads_root - own.kv.length)
            own.known = 0 if own.features is None else end
        own.step_at = -1
