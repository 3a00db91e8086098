"""Plain decoding, one token per pass: what speculation must reproduce, and is measured against.

The same model, cache, token sampler and loop, without streams and trees, and pipelined as mlx-lm
does it: the next pass is scheduled from the token on the device before the host has read it. In
shared mode the fine-tuned model is only defined with its streams, so its plain decoding is the
speculative step with a tree of one node (`plain_decoder`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from ..config import DecodeConfig, TreeSpec
from ..model.backbone import Backbone
from ..model.cache import KVCache
from .decode import Decoder, committed
from .drafters.lookup import LookUp
from .drafting import StreamDecoder
from .result import StepReport, StepResult
from .sampling import TokenSampler
from .step import Step
from .streams import Streams
from .tree import DraftTree, root_only


@dataclass
class PlainDecoder(Decoder):
    """Decodes one token per pass with the base model alone.

    `run_ahead` is asked before a pass is scheduled whose root the host has not read yet; a
    caller that knows it will stop here says no, and no pass is wasted.
    """

    backbone: Backbone
    token_sampler: TokenSampler
    run_ahead: Callable[[], bool] = lambda: True
    keep_drafts: bool = False
    lookup: LookUp | None = None

    @property
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""
        return self.backbone.forward

    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the pass of `root`."""
        return self._pass(root_only(mx.array([root])), cache)

    def step_ahead(self, step: Step, cache: KVCache) -> Step | None:
        """Return the pass of the token that `step` draws; None if that is needed on the host first."""
        if self.token_sampler.waits or not self.run_ahead():
            return None
        return self._pass(step.next_tree, cache, pending=1)

    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the pass of the token that `step` has drawn."""
        del result
        return self._pass(step.next_tree, cache) if ahead is None else ahead

    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a pass and commit its token."""
        return committed(step, step.read(), cache, self)

    def _pass(self, tree: DraftTree, cache: KVCache, pending: int = 0) -> Step:
        """Return the pass of a tree's root, as a graph.

        `pending` rows behind the committed ones belong to a pass that is still under way.
        """
        generated = cache.next_is_generated
        cache.advance(pending, generated)
        try:
            hidden = self.backbone.forward(tree.tokens, cache)
        finally:  # Ctrl-C may fall in here, and the cache outlives this loop
            cache.advance(-pending, generated)
        logits = self.backbone.logits(hidden)
        drawn, finite = self.token_sampler(logits, tree, ahead=pending > 0)
        report = StepReport.of(accepted=mx.array(0), finite=finite, tokens=drawn)
        return Step(tree, report, logits, root_only(drawn))


def plain_decoder(
    backbone: Backbone, streams: Streams | None, token_sampler: TokenSampler
) -> PlainDecoder | StreamDecoder:
    """Return the plain decoding that speculation with `streams` must reproduce."""
    if streams is None or not streams.shared:
        return PlainDecoder(backbone, token_sampler)
    config = replace(DecodeConfig(), tree=TreeSpec(kind="best", rows=1))
    return StreamDecoder(streams, config, token_sampler)
