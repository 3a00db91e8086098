"""Plain decoding, one token per pass: the oracle of every claim and the denominator of every ratio.

The same model, cache and chooser as the speculative loop, without streams and trees, and
pipelined as mlx-lm does it: the next pass is scheduled from the token on the device before the
host has read it. In shared mode the fine-tuned model is only defined with its streams, so its
plain decoding is the speculative step with a tree of one node (`plain_decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import DecodeConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, prefill
from .decode import StreamDecoder
from .result import StepResult, read_report
from .sampling import TokenChooser
from .streams import Streams
from .tree import DraftTree, root_only


@dataclass
class PlainDecoder:
    """Decodes one token per pass with the base model alone."""

    backbone: Backbone
    chooser: TokenChooser

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text; the last prompt token is not for here."""
        prefill(self.backbone.forward, tokens, cache, on_progress, chunk)

    def steps(
        self,
        root: int,
        cache: KVCache,
        more: Callable[[StepResult], bool],
        run_ahead: Callable[[], bool] = lambda: True,
    ) -> Iterator[StepResult]:
        """Yield one token per step from `root`, as `StreamDecoder.steps` yields several.

        `run_ahead` is asked before a pass is scheduled whose root the host has not read yet; a
        caller that knows it will stop here says no, and no pass is wasted.

        Raises:
            ModelError: the model computed NaN.
        """
        report, logits = self._pass(root_only(mx.array([root])), cache)
        mx.async_eval(report, logits)
        while True:
            ahead = None
            # A chooser that waits needs the token on the host first.
            if not self.chooser.waits and run_ahead():
                ahead = self._pass(root_only(report[2]), cache, pending=1)
                mx.async_eval(*ahead)
            tokens = read_report(report, 1, cache).tokens
            cache.advance(1, drawn=True)
            self.chooser.history += tokens
            result = StepResult(tokens, 0, logits)
            wanted = more(result)
            if wanted and ahead is None:
                ahead = self._pass(root_only(mx.array(tokens)), cache)
                mx.async_eval(*ahead)
            yield result
            if not wanted or ahead is None:
                return
            report, logits = ahead

    def _pass(self, tree: DraftTree, cache: KVCache, pending: int = 0) -> tuple[mx.array, mx.array]:
        """Return the report (4,) and logits (1, V) of one token, as a graph.

        `pending` rows behind the committed ones belong to a pass that is still under way.
        """
        after_draw = cache.drawn_next
        cache.advance(pending, after_draw)
        try:
            hidden = self.backbone.forward(tree.tokens, cache)
        finally:  # Ctrl-C may fall in here, and the cache outlives this loop
            cache.advance(-pending, after_draw)
        normed = self.backbone.norm(hidden)
        logits = self.backbone.head(normed)[0]
        drawn, finite = self.chooser(logits, tree, ahead=pending > 0)
        finite = finite & ~mx.any(mx.isnan(normed))
        zero = mx.zeros((1,), dtype=mx.int32)
        report = mx.concatenate([zero, finite.reshape(1).astype(mx.int32), drawn, zero])
        return report, logits


def plain_decoder(
    backbone: Backbone, streams: Streams | None, chooser: TokenChooser
) -> PlainDecoder | StreamDecoder:
    """Return the plain decoding that speculation with `streams` must reproduce."""
    if streams is None or not streams.shared:
        return PlainDecoder(backbone, chooser)
    config = replace(DecodeConfig(), tree=TreeSpec(kind="best", rows=1))
    return StreamDecoder(streams, config, chooser)
