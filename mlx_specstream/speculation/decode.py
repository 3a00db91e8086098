"""The decoding loop: prefill; then, while another step is wanted, step, schedule, yield, commit.

    prompt ──► prefill ──► step ──► finish: wait, accept, commit ──► tokens
                            ▲                                          │
                            └────────── next step ◄── should continue? ┘

`decode` is that loop, for every way of decoding. What a step is made of is in `step.py`; a
`Decoder` says which step comes next: `DraftDecoder` (`drafting.py`) always drafts, `PlainDecoder`
(`plain.py`) never, `AutoDecoder` (`planner/adaptive.py`) as it pays. This module knows token ids, not text.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from ..errors import ModelError
from ..model.cache import KVCache
from ..model.prefill import PREFILL_CHUNK, ChunkSize, prefill
from .drafters.lookup import LookUp
from .result import DraftRecord, StepResult, StopCriteria, Verdict, to_ints
from .sampling import TokenSampler
from .step import Step

log = logging.getLogger("mlx_specstream")


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    cache: KVCache,
    criteria: StopCriteria,
    on_progress: Callable[[int, int], None] | None = None,
    chunk: ChunkSize = PREFILL_CHUNK,
) -> Iterator[StepResult]:
    """Continue a text by one accepted path after another until `criteria` have had enough.

    The text is what `cache` holds, then `prompt`, of which all but the last token are in the
    prefill; the last one is the root of the first step. The following step is scheduled before a
    result is yielded, so that the device works while the caller shows text. A caller that wants
    only some of the last step's tokens rewinds the cache itself.

    Args:
        prompt: token ids, at least one.
        on_progress: told (prompt tokens done, of how many).
        chunk: prompt tokens per pass.

    Raises:
        ModelError: the model computed NaN.
    """
    decoder.begin(prompt, cache)
    decoder.prefill(prompt[:-1], cache, on_progress, chunk)
    step = decoder.first_step(prompt[-1], cache)
    step.schedule()
    if decoder.lookup is not None:
        decoder.lookup.read()
    while True:
        # Plain decoding starts the next pass from a token that the host has not read yet.
        ahead = decoder.step_ahead(step, cache)
        if ahead is not None:
            ahead.schedule()
        result = decoder.finish(step, cache)  # waits for the device, once per step
        wanted = criteria.should_continue(result)
        decoder.learn(result, cache, wanted=wanted)
        following = decoder.next_step(step, ahead, result, cache) if wanted else None
        if following is not None and following is not ahead:
            following.schedule()
        decoder.pause()
        yield result
        decoder.resume()
        if following is None:
            return
        step = following


class Decoder(ABC):
    """One way of decoding: which step comes first, and which one next.

    token_sampler: draws the target's tokens, by argmax or a sampler, after logits processors.
    lookup: told of all tokens, if there is one.
    """

    token_sampler: TokenSampler
    keep_drafts: bool
    lookup: LookUp | None

    @property
    @abstractmethod
    def forward(self) -> Callable[[mx.array, KVCache], mx.array]:
        """Return what runs consecutive tokens of a prompt."""

    def begin(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Learn that an answer to `prompt` begins, behind what `cache` holds."""
        if self.lookup is not None:
            self.lookup.begin(prompt, cache, self.token_sampler.history)

    @abstractmethod
    def first_step(self, root: int, cache: KVCache) -> Step:
        """Return the step of the one token that is not in the cache yet, without drafts."""

    def step_ahead(self, step: Step, cache: KVCache) -> Step | None:
        """Return the step after `step`, which has not been read yet, if that can be built."""
        del step, cache
        return None

    @abstractmethod
    def next_step(self, step: Step, ahead: Step | None, result: StepResult, cache: KVCache) -> Step:
        """Return the step after `step`, which decided `result`; `ahead`: what `step_ahead` gave."""

    @abstractmethod
    def finish(self, step: Step, cache: KVCache) -> StepResult:
        """Wait for a step, the loop's one synchronisation, and commit what it accepted."""

    def keep(self, verdict: Verdict, cache: KVCache) -> None:  # noqa: B027 (optional)
        """Bring the rows of an accepted path to the end of the committed text."""

    def learn(self, result: StepResult, cache: KVCache, *, wanted: bool) -> None:  # noqa: B027 (optional)
        """Take note of a step's result before the next one is built, if one is `wanted`."""

    def pause(self) -> None:  # noqa: B027 (optional)
        """Learn that the caller takes over, for as long as it likes."""

    def resume(self) -> None:  # noqa: B027 (optional)
        """Learn that the caller wants to go on."""

    def prefill(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        on_progress: Callable[[int, int], None] | None = None,
        chunk: ChunkSize = PREFILL_CHUNK,
    ) -> None:
        """Append all of `tokens` to the committed text; the last prompt token is not for here."""
        if tokens:
            prefill(self.forward, tokens, cache, on_progress, chunk)
            mx.clear_cache()  # of the chunks' intermediate results, which no step needs

    def steps(self, root: int, cache: KVCache, criteria: StopCriteria) -> Iterator[StepResult]:
        """Yield step after step from `root`, the one token that is not in the cache yet."""
        return decode(self, [root], cache, criteria)


def committed(step: Step, verdict: Verdict, cache: KVCache, decoder: Decoder) -> StepResult:
    """Commit what a step accepted, and return its result.

    Raises:
        ModelError: the model computed NaN.
    """
    if not verdict.finite:
        raise not_a_number(cache.length)
    tokens, nodes = verdict.tokens, verdict.nodes
    decoder.keep(verdict, cache)
    cache.advance(len(tokens), generated=True)
    decoder.token_sampler.extend(tokens)
    if decoder.lookup is not None:
        decoder.lookup.take(tokens)
    draft, tree = None, step.tree
    if decoder.keep_drafts:
        found = [] if tree.looked_up is None else to_ints(tree.looked_up)
        draft = DraftRecord(
            to_ints(tree.tokens),
            to_ints(tree.parents),
            to_ints(tree.depths),
            nodes,
            tuple(node for node, looked_up in enumerate(found) if looked_up),
        )
    logits = step.logits[: len(tokens)]
    return StepResult(tokens, tree.num_nodes - 1, logits, draft, step.expected, verdict.looked_up)


def not_a_number(length: int) -> ModelError:
    """Return the error of a model that computed NaN behind `length` committed tokens."""
    return ModelError(
        f"the model's output is not a number (NaN) after {length} tokens: its weights are "
        "damaged, or overflow in this precision; check the files or use another dtype."
    )
