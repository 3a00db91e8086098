"""A long chat, with edits, retries and interruptions: is its KV cache still that of a fresh prefill?

    python -m tests.apps.thirty_turns --model demo --streams demo-chat

After every turn the cache's rows are compared with those of a prefill that knows the text alone,
and so are the tokens that the model would say next from either. What MLX holds beyond model and
cache must stay the same. Prints a line for each turn; exits 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_specstream import StreamModel, load
from mlx_specstream.apps.chat.session import ChatSession
from mlx_specstream.apps.chat.settings import Settings
from mlx_specstream.model.cache import KVCache
from mlx_specstream.speculation.plain import plain_decoder
from mlx_specstream.speculation.result import MaxTokens
from mlx_specstream.speculation.sampling import TokenSampler

TURNS = 30
NEXT_TOKENS = 6
ROWS_TOLERANCE = 1e-3  # of keys and values in float32, relative to the largest
HELD_BYTES = 2**20  # beside model and cache: compiled graphs, constants, the last answer's arrays
QUESTIONS = (
    "Why is the sky blue?",
    "And at sunset?",
    "Name three colours.",
    "Which of them is the warmest?",
    "What is 12 times 12?",
    "Write a line about a cat 🐈.",
    "Say that again, shorter.",
)


@dataclass(frozen=True)
class Turn:
    """What a turn left: rows in the cache, prompt tokens computed for it, and the comparison.

    difference: of rows, relative to the largest. same: the next tokens are those of a fresh prefill.
    held_bytes: what MLX holds beside the cache.
    """

    number: int
    what: str
    rows: int
    computed: int
    prompt: int
    difference: float
    same: bool
    cache_bytes: int
    held_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.number:3} {self.what:<11} {self.rows:5} rows, {self.computed:4} of "
            f"{self.prompt:4} prompt tokens computed, rows differ by {self.difference:.1e}, next "
            f"tokens {'same' if self.same else 'OTHERS'}, cache {self.cache_bytes / 2**20:6.2f} MiB, "
            f"else {self.held_bytes / 2**20:8.3f} MiB"
        )


def chatting(session: ChatSession, turns: int = TURNS) -> Iterator[Turn]:
    """Have so many turns and yield what each left."""
    for number in range(1, turns + 1):
        conversation = session.conversation.copy()
        what, stop_after = "ask", 10**6
        if number % 7 == 4:
            what = "retry"
            conversation.retry()
        elif number % 7 == 6:
            what = "edit"
            last = len(conversation.exchanges)
            conversation.edit(max(1, last - number % 3), f"Tell me more, number {number}.")
        else:
            conversation.ask(QUESTIONS[number % len(QUESTIONS)])
        if number % 5 == 3:
            what, stop_after = f"{what}, stopped", 3 + number % 4
        for place, _ in enumerate(session.answer(conversation, _after(stop_after))):
            assert place <= stop_after
        yield compared(session, number, what)


def _after(count: int) -> Callable[[], bool]:
    asked = iter(range(10**9))
    return lambda: next(asked) >= count


def compared(session: ChatSession, number: int, what: str) -> Turn:
    """Compare a session's cache with a fresh prefill of its tokens."""
    prefix, reply, model = session.prefix, session.reply, session.model
    assert reply is not None
    assert prefix.kv.length == len(prefix.tokens)
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory() - prefix.kv.nbytes
    cache_bytes = prefix.kv.nbytes
    fresh = KVCache(model.backbone.num_layers)
    for _ in model.prefill(prefix.tokens, fresh, 256):
        pass
    difference = 0.0
    for own, other in zip(prefix.kv.layers, fresh.layers, strict=True):
        for found, wanted in zip(own.read(prefix.kv.length), other.read(fresh.length), strict=True):
            scale = mx.abs(wanted).max()
            away = mx.abs(found - wanted).max() / scale
            difference = max(difference, cast(float, away.item()))
    root = reply.tokens[-1] if reply.tokens else reply.prompt[-1]
    own_next = following(model, prefix.fork(prefix.kv.length), root)
    return Turn(
        number,
        what,
        prefix.kv.length,
        reply.prefilled,
        len(reply.prompt),
        difference,
        own_next == following(model, fresh, root),
        cache_bytes,
        held,
    )


def following(model: StreamModel, cache: KVCache, root: int) -> list[int]:
    """Return the tokens that follow `root` behind a cache's rows, decoded plainly."""
    decoder = plain_decoder(model.backbone, model.streams, TokenSampler())
    criteria = MaxTokens(NEXT_TOKENS)
    for _ in decoder.steps(root, cache, criteria):
        pass
    return criteria.tokens


def faults(turns: list[Turn]) -> list[str]:
    """Return what is amiss."""
    found = [
        f"turn {t.number} left other rows" for t in turns if not t.difference <= ROWS_TOLERANCE
    ]
    found += [f"turn {t.number} would go on otherwise" for t in turns if not t.same]
    settled = [turn.held_bytes for turn in turns[len(turns) // 3 :]]
    if max(settled) - settled[0] > HELD_BYTES:
        found.append(f"memory grew by {max(settled) - settled[0]} bytes that the cache is not")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.apps.thirty_turns")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", default="auto")
    parser.add_argument("--tree", default="8")
    parser.add_argument("--max-tokens", default="24")
    options = parser.parse_args(argv)
    model, tokenizer = load(options.model, streams=options.streams)
    settings = Settings().changed("tree", options.tree).changed("max-tokens", options.max_tokens)
    turns = []
    for turn in chatting(ChatSession(model, tokenizer, settings)):
        turns.append(turn)
        print(turn, flush=True)
    for fault in faults(turns):
        print(f"AMISS: {fault}")
    return 1 if faults(turns) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
