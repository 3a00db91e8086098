"""Samples of what a cost curve is made of: plain tokens and dependent steps at a fixed context.

A cache of zeros stands in for committed text: what the model says there is nonsense, but it costs
the same.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..config import DecodeConfig
from ..model.backbone import Backbone
from ..model.cache import KVCache
from ..speculation.drafting import StreamDecoder
from ..speculation.plain import PlainDecoder, plain_decoder
from ..speculation.result import MaxTokens
from ..speculation.sampling import TokenSampler
from ..speculation.streams import Streams
from ..speculation.tree import DraftTree, root_only
from .settings import StepSetting

MIN_TOKENS, MAX_TOKENS, SAMPLE_S = 3, 16, 0.1
"""A sample of plain decoding takes so many tokens, as fill so many seconds."""
_TOKEN = 1


class PlainTokens:
    """Plain decoding at a fixed context, pipelined as it really runs."""

    def __init__(
        self, backbone: Backbone, streams: Streams | None, clock: Callable[[], float]
    ) -> None:
        self.decoder = plain_decoder(backbone, streams, TokenSampler())
        self.caches = _Caches(backbone, self.decoder.forward)
        self.clock = clock
        self.tokens = MIN_TOKENS

    def sample(self, context: int) -> float:
        """Return the seconds of a token, on average over a pipelined run.

        Timed from an idle device to an idle device: a result alone tells little, since scheduling
        the pass after it may take until most of that is computed. The host's share of the first
        token is not hidden behind the device, so the shorter tokens are, the more are taken.
        """
        seconds = self._run(context, self.tokens)
        self.tokens = max(MIN_TOKENS, min(MAX_TOKENS, round(SAMPLE_S / max(seconds, 1e-6))))
        return seconds

    def _run(self, context: int, number: int) -> float:
        cache = self.caches.at(context)
        self.decoder.token_sampler.history.clear()
        criteria = MaxTokens(number)
        if isinstance(self.decoder, PlainDecoder):
            # The last pass is known to be the last, so that none runs on into the next sample.
            self.decoder.run_ahead = lambda: len(criteria.tokens) < number - 1
        steps = self.decoder.steps(_TOKEN, cache, criteria)
        mx.synchronize()
        begin = self.clock()
        for _ in steps:
            pass
        mx.synchronize()
        return (self.clock() - begin) / number


class Steps:
    """Dependent steps with one plan at a fixed context."""

    def __init__(self, streams: Streams, plan: StepSetting, clock: Callable[[], float]) -> None:
        self.decoder = StreamDecoder(streams, plan.config(DecodeConfig()), TokenSampler())
        self.caches = _Caches(streams.backbone, self.decoder.forward)
        self.clock = clock
        self.tree: DraftTree | None = None

    def sample(self, context: int, number: int) -> float:
        """Return the seconds of a step, on average over `number` of them."""
        cache = self.caches.at(context)
        if self.tree is None:
            self.tree = self._step(root_only(mx.array([_TOKEN])), cache)
        begin = self.clock()
        for _ in range(number):
            self.tree = self._step(self.tree, cache)
        # Only now is the last step's draft complete; in a loop the next step would wait for it.
        mx.eval(self.tree.arrays)
        return (self.clock() - begin) / number

    def restart(self, context: int) -> float:
        """Return the seconds of a step of the root alone."""
        cache = self.caches.at(context)
        begin = self.clock()
        mx.eval(self._step(root_only(mx.array([_TOKEN])), cache).arrays)
        return self.clock() - begin

    def _step(self, tree: DraftTree, cache: KVCache) -> DraftTree:
        self.decoder.token_sampler.history.clear()
        step = self.decoder.stepper.step(tree, cache)
        step.schedule()
        tree = step.next_tree  # also where the path ends without streams: it costs the same
        self.decoder.finish(step, cache)
        return tree


class _Caches:
    """A KV cache whose committed text is nothing but zeros, rewound for every sample.

    Layers that keep a state have no text to rewind to: there a sample begins an empty one.
    """

    def __init__(
        self, backbone: Backbone, forward: Callable[[mx.array, KVCache], mx.array]
    ) -> None:
        self.backbone, self.forward = backbone, forward
        self.made: dict[int, KVCache] = {}

    def at(self, context: int) -> KVCache:
        if self.backbone.is_recurrent:
            return self.backbone.new_cache()
        if context not in self.made:
            cache = KVCache(self.backbone.num_layers)
            # A row at the far end makes buffers of zeros before it.
            cache.length = context
            self.forward(mx.array([_TOKEN]), cache)
            mx.eval(cache.arrays)
            self.made = {context: cache}  # one at a time: long ones are large
        cache = self.made[context]
        cache.rewind(context)
        return cache
