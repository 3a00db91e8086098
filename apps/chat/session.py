"""A chat with a model: asks, keeps conversation and KV cache in step, and remembers the last answer.

Whatever happens to an answer (the end, Ctrl-C, an error), the cache holds a beginning of the
prompt and the tokens that were given out. An answer that was stopped before its first word
leaves the conversation as if nothing had been asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from ... import GenerationResponse, StreamModel, stream_generate
from ...config import CacheConfig
from ...machine import ranks
from ...model.cache.kinds import check_quantised
from ...model.prefill import PREFILL_CHUNK, ChunkSize, PacedChunks
from ...prompts import Prompt, encode_prompt
from ...speculation.result import DraftRecord
from ..conversation import Conversation, Message
from ..learning import Learner
from ..prefix import PrefixCache
from ..thinking import Segment, ThoughtMarks, ThoughtSplitter
from .settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_lm.tokenizer_utils import TokenizerWrapper


class StoppedError(Exception):
    """Ctrl-C while the prompt was being read."""


@dataclass(frozen=True)
class DraftStep:
    """One pass: the tokens it gave out and who proposed each, and the tree it verified if any."""

    tokens: list[int]
    origins: list[int]
    draft: DraftRecord | None


@dataclass
class Reply:
    """An answer as it grows, with what it took to make it.

    prompt: all token ids that asked for it. prefilled: how many of them were computed; the cache
    held the others. segments: thoughts and content, in the order they came; text and thought: all
    of the one and of the other.
    """

    prompt: list[int]
    prefilled: int
    splitter: ThoughtSplitter
    forgot: int = 0
    segments: list[Segment] = field(default_factory=list)
    text: str = ""
    thought: str = ""
    thought_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    steps: list[DraftStep] = field(default_factory=list)
    last: GenerationResponse | None = None
    stopped: bool = False

    def add(self, response: GenerationResponse) -> None:
        """Take in the next token; a step's tokens are counted from stream 1, main comes last."""
        self.thought_tokens += self.splitter.inside
        self._split(response.text, over=response.finish_reason is not None)
        self.tokens.append(response.token)
        if self.last is None or response.stats.passes != self.last.stats.passes:
            self.steps.append(DraftStep([], [], response.draft))
        self.steps[-1].tokens.append(response.token)
        self.steps[-1].origins.append(response.origin)
        self.last = response

    def stop(self) -> None:
        """Take in that no more will come."""
        self.stopped = True
        self._split("", over=True)

    def _split(self, text: str, *, over: bool) -> None:
        for segment in self.splitter.feed(text, over=over):
            self.segments.append(segment)
            if segment.is_thought:
                self.thought += segment.text
            else:
                self.text += segment.text


def _never() -> bool:
    return False


@dataclass
class ChatSession:
    """One conversation with one model.

    current: the answer that is growing, or the last one that was begun. reply: the last one that
    is part of the conversation. Both are None before the first. caching: how the cache holds rows.
    chunks: how much of a prompt is read between two looks at Ctrl-C. learner: keeps answers to train
    on, if the user wants that.
    """

    model: StreamModel
    tokenizer: TokenizerWrapper
    settings: Settings = field(default_factory=Settings)
    conversation: Conversation = field(default_factory=Conversation)
    caching: CacheConfig = field(default_factory=CacheConfig)
    learner: Learner | None = None
    current: Reply | None = None
    reply: Reply | None = None
    # Paced by the clock, unless processes with clocks of their own must run the same passes.
    chunks: ChunkSize = field(
        default_factory=lambda: PREFILL_CHUNK if ranks.is_launched() else PacedChunks()
    )
    prefix: PrefixCache = field(init=False)
    marks: ThoughtMarks | None = field(init=False)

    def __post_init__(self) -> None:
        backbone = self.model.backbone
        check_quantised(backbone.forward, backbone.windows, self.caching)
        self.prefix = PrefixCache.for_model(backbone, self.caching)
        self.marks = ThoughtMarks.of(self.tokenizer)
        self.use(self.settings)

    def use(self, settings: Settings) -> None:
        """Change the settings; a new seed starts its random numbers over."""
        self.settings = settings
        if settings.sampling.seed is not None:
            mx.random.seed(settings.sampling.seed)

    @property
    def mode(self) -> str:
        """Return lossless, shared, plain, or lossy (with typical acceptance)."""
        mode, decode = self.model.drafting, self.settings.decode
        if self.settings.mode == "plain":
            return "plain"
        if mode == "plain":
            return "look-up" if decode.looks_up else "plain"
        if decode.lossy:
            return "lossy" if mode == "lossless" else f"{mode}, lossy"
        return mode

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of messages in the model's chat template."""
        return self._encode(messages, thinks=self.settings.thinking != "off")

    @property
    def may_not_think(self) -> bool:
        """Tell whether the chat template heeds a wish for no thoughts."""
        messages = [{"role": "user", "content": "Hi"}]
        return self._encode(messages, thinks=False) != self._encode(messages, thinks=True)

    def _encode(self, messages: Sequence[Message], *, thinks: bool) -> list[int]:
        options = None if thinks else {"enable_thinking": False}
        return encode_prompt(self.tokenizer, Prompt(tuple(messages)), template_options=options)

    def answer(
        self,
        conversation: Conversation,
        stopped: Callable[[], bool] = _never,
        on_prompt: Callable[[int, int], None] | None = None,
    ) -> Iterator[GenerationResponse]:
        """Yield the answer to `conversation`'s waiting question, which then becomes the session's.

        Args:
            stopped: asked after every token, and between parts of the prompt.
            on_prompt: told how many of the prompt's tokens that must be computed are done.

        Raises:
            SpecStreamError: it cannot be answered; the session stays as it was.
        """
        settings = self.settings
        forgotten = conversation.forgotten
        vocab_size = self.model.backbone.vocab_size
        ids = conversation.prompt(self.encode, self.model.context_length, settings.max_tokens)
        rest = self.prefix.reuse(ids)
        splitter = ThoughtSplitter.after(self.marks, ids)
        reply = Reply(ids, len(rest), splitter, max(0, conversation.forgotten - forgotten))
        self.current = reply

        def progress(done: int, total: int) -> None:
            if done < total and stopped():
                raise StoppedError
            if on_prompt is not None:
                on_prompt(done, total)

        finished = False
        try:
            stream = stream_generate(
                self.model,
                self.tokenizer,
                rest,
                max_tokens=self._budget(len(ids)),
                sampler=settings.sampling.sampler(vocab_size, self.tokenizer),
                logits_processors=settings.sampling.processors(vocab_size),
                prompt_cache=self.prefix.kv,
                prefill_step_size=self.chunks,
                prompt_progress_callback=progress,
                config=settings.decode,
                speculative=settings.mode == "speculative",
                keep_drafts=True,
            )
            try:
                for response in stream:
                    reply.add(response)
                    yield response
                    if response.finish_reason is None and stopped():
                        reply.stop()
                        break
            finally:
                stream.close()  # type: ignore[attr-defined]
            finished = True
        except StoppedError:
            finished = True
            reply.stop()
        except GeneratorExit:
            finished = True
            reply.stop()
            raise
        finally:
            if finished:
                self.prefix.settle(ids + reply.tokens)
                if self.learner is not None and not settings.decode.lossy:
                    self.learner.keep(ids, reply.tokens)
            else:  # an error from anywhere: trust no row
                self.prefix.reset()
            if reply.text or (finished and not reply.stopped):
                conversation.answer(
                    reply.text,
                    stopped=reply.stopped or not finished,
                    thought=reply.thought or None,
                )
                self.conversation, self.reply = conversation, reply

    def _budget(self, prompt_tokens: int) -> int:
        """Return how many tokens the answer may have, within the context."""
        limit, wanted = self.model.context_length, self.settings.max_tokens
        if limit is None:
            return wanted
        left = limit - prompt_tokens
        return left if wanted == -1 else min(wanted, left)
