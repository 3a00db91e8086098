"""How much faster than plain decoding, measured here and now.

The last answer's beginning is generated again, plainly and speculatively in turn (P S S P ...),
so that both see the same text and the same state of the machine. It happens in a copy of the
KV cache and with the random state put back: nothing of the conversation changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ... import stream_generate
from ...machine import ranks
from .session import ChatSession, Reply

ROUND_TOKENS = 32
FEWEST_TOKENS = 6  # of each kind; below, a ratio says nothing
ORDER = (False, True, True, False)  # speculative?


@dataclass(frozen=True)
class Speed:
    """Tokens per second of both ways of decoding, over the same text."""

    plain_tps: float
    speculative_tps: float
    tokens: int

    @property
    def ratio(self) -> float:
        """Return how many times faster speculation is."""
        return self.speculative_tps / self.plain_tps

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f}× plain decoding ({self.speculative_tps:.1f} against "
            f"{self.plain_tps:.1f} tok/s, in turn over {self.tokens} tokens each)"
        )


def measure(
    session: ChatSession, budget_s: float, stopped: Callable[[], bool] = lambda: False
) -> Speed | None:
    """Return the speeds of the last answer's text, or None if too little of it fits `budget_s`.

    The first token of a run is not counted: it waits for the prompt's last pass.
    """
    reply = session.reply
    if reply is None or session.mode == "plain" or len(reply.tokens) <= FEWEST_TOKENS:
        return None
    spent = {False: 0.0, True: 0.0}
    tokens = {False: 0, True: 0}
    state: Any = mx.random.state
    high, low = state[0].tolist()  # the key that seed(high << 32 | low) makes
    deadline = ranks.clock() + budget_s
    try:
        while not stopped():
            for speculative in ORDER:
                share = (deadline - ranks.clock()) / 2
                seconds, counted = _run(session, reply, speculative, share, stopped)
                spent[speculative] += seconds
                tokens[speculative] += counted
            if ranks.clock() > deadline or min(tokens.values()) >= 4 * ROUND_TOKENS:
                break
    finally:
        mx.random.seed(high << 32 | low)
    if stopped() or min(tokens.values()) < FEWEST_TOKENS or not all(spent.values()):
        return None
    return Speed(tokens[False] / spent[False], tokens[True] / spent[True], min(tokens.values()))


def _run(
    session: ChatSession,
    reply: Reply,
    speculative: bool,
    budget_s: float,
    stopped: Callable[[], bool],
) -> tuple[float, int]:
    """Generate the answer's beginning; return the seconds after its first pass and the tokens."""
    vocab_size = session.model.backbone.vocab_size
    cache = session.prefix.fork(min(len(reply.prompt) - 1, session.prefix.kv.length))
    stream = stream_generate(
        session.model,
        session.tokenizer,
        reply.prompt[cache.length :],
        max_tokens=min(ROUND_TOKENS, len(reply.tokens)),
        sampler=session.settings.sampling.sampler(vocab_size, session.tokenizer),
        logits_processors=session.settings.sampling.processors(vocab_size),
        prompt_cache=cache,
        config=session.settings.decode,
        speculative=speculative,
    )
    began, now, first, count, seen = ranks.clock(), 0.0, 0, 0, 0
    start = began
    for response in stream:
        if response.stats.passes == 1:  # its tokens are those of the first pass
            start, first = ranks.clock(), response.generation_tokens
            now = start
        elif response.origin == 0 or response.finish_reason is not None:  # a pass is complete
            now, count = ranks.clock(), response.generation_tokens
            seen += 1
        if stopped() or (seen >= 2 and ranks.clock() - began > budget_s):
            break
    stream.close()  # type: ignore[attr-defined]
    return max(0.0, now - start), max(0, count - first)
