"""The benchmark's loop: every prompt answered by every method, a few tokens of each in turns.

A slow moment of the machine hits all methods alike, and none is always first. Each method's very
first answer is kept apart as cold: it pays for compiling and for first touches of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import DataError
from ..machine import rounds_float32
from ..prompts import Prompt, encode_prompt
from ..verify import first_difference, judge, reference_logits
from .cases import Case
from .competitors import Competitors
from .measure import Answered, in_turns
from .methods import MLX_LM
from .result import AskedPrompt, MethodRun, Result

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

COLD_TOKENS = 16

Show = Callable[[str], None]


@dataclass
class Bench:
    """A benchmark under way: `result` is written to `path` after every prompt."""

    competitors: Competitors
    cases: list[Case]
    result: Result
    path: Path
    on_step: Show = lambda _: None
    on_prompt: Callable[[Sequence[AskedPrompt]], None] = lambda _: None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.begun = self.clock()

        self._drop_too_long()

    def _drop_too_long(self) -> None:
        """Leave out prompts that the model's context cannot hold with their answers."""
        fits = [case for case in self.cases if self._fits(case.prompt)]
        if not fits:
            raise DataError(
                "no prompt fits into the model's context of "
                f"{self.competitors.model.context_length} tokens with its answer; lower --max-tokens."
            )
        if len(fits) < len(self.cases):
            self.result.left_out.append(
                f"{len(self.cases) - len(fits)} of {len(self.cases)} prompts: too long for the "
                "model's context"
            )
        self.cases = fits

    def _fits(self, prompt: Prompt) -> bool:
        context = self.competitors.model.context_length
        length = len(encode_prompt(self.competitors.tokenizer, prompt))
        return context is None or length + self.result.settings.max_tokens <= context

    @property
    def names(self) -> list[str]:
        return list(self.competitors.methods)

    def plain_runs(self) -> list[MethodRun]:
        """Return mlx-lm's runs so far."""
        runs = [run for asked in self.result.asked for run in asked.runs]
        return [run for run in runs if run.method == MLX_LM.label]

    def warm_up(self) -> None:
        """Let every method answer the first prompt once, and note the cold figures."""
        limit = min(COLD_TOKENS, self.result.settings.max_tokens)
        case = self.cases[0]
        prompt = encode_prompt(self.competitors.tokenizer, case.prompt)
        cold = []
        for order, name in enumerate(self.names):
            self.on_step(f"warming up: {name}")
            answer = self.competitors.answer(name, case.category, prompt, limit)
            in_turns([answer], 0)
            cold.append(_run(name, 0, order, answer.answered))
        self.result.cold = self.result.cold or cold  # resumed: the first process's are colder
        self._warm = cold

    def estimate_s(self, num_cases: int | None = None) -> float:
        """Return how many seconds the prompts take at most: answers may end before max_tokens.

        From the cold runs; prompts are taken to be as long as the first.
        """
        settings = self.result.settings
        turns = sum(1 + len(case.more_turns) for case in self.cases[:num_cases])
        each = sum(
            run.prefill_s + (run.token_s or run.prefill_s) * (settings.max_tokens - 1)
            for run in self._warm
        )
        return turns * settings.repeats * each

    def measure(self) -> None:
        """Ask all prompts that have not been asked, or as many (one at least) as the limit allows."""
        done = {(asked.category, asked.sha256) for asked in self.result.asked}
        left = [case for case in self.cases if (case.category, case.sha256) not in done]
        limit = self.result.settings.limit_s
        longest = 0.0
        for place, case in enumerate(left):
            started = self.clock()
            if limit and self.result.asked and started - self.begun + longest > limit:
                skipped = len(left) - place
                self.result.left_out.append(
                    f"{skipped} of {len(self.cases)} prompts: the time was up"
                )
                break
            asked = self._ask(case, len(self.cases) - len(left) + place)
            longest = max(longest, self.clock() - started)
            self.result.asked += asked
            self.result.save(self.path)
            self.on_prompt(asked)
        self.result.complete = True
        self.result.finished = now()
        self.result.save(self.path)

    def _ask(self, case: Case, number: int) -> list[AskedPrompt]:
        """Have all turns of a prompt answered by all methods."""
        asked = []
        messages = list(case.prompt.messages)
        for turn in range(1 + len(case.more_turns)):
            if turn:
                messages.append({"role": "user", "content": case.more_turns[turn - 1]})
            prompt = Prompt(tuple(messages), case.prompt.text) if turn else case.prompt
            if turn and not self._fits(prompt):
                self.result.left_out.append(f"a later turn of {prompt.title[:40]!r}: too long")
                break
            found, text = self._ask_turn(case, prompt, turn, number)
            asked.append(found)
            messages.append({"role": "assistant", "content": text})
        return asked

    def _ask_turn(
        self, case: Case, prompt: Prompt, turn: int, number: int
    ) -> tuple[AskedPrompt, str]:
        """Have one turn answered; return the runs and the reference's text."""
        from mlx_lm.generate import wired_limit

        ids = encode_prompt(self.competitors.tokenizer, prompt)
        settings, names = self.result.settings, self.names
        answers: list[tuple[str, int, int, Answered]] = []
        for repeat in range(settings.repeats):
            first = (number + turn + repeat) % len(names)
            turns = names[first:] + names[:first]
            self.on_step(f"{case.category}: {prompt.title}")
            begun = [
                self.competitors.answer(name, case.category, ids, settings.max_tokens)
                for name in turns
            ]
            with wired_limit(self.competitors.model.model):  # once: answers end at different times
                in_turns(begun, settings.turn_tokens)
            answers += [
                (name, repeat, order, answer.answered)
                for order, (name, answer) in enumerate(zip(turns, begun, strict=True))
            ]
        reference = next(a for name, _, _, a in answers if name == MLX_LM.label)
        runs = [
            self._judged(_run(name, repeat, order, answered), answered, reference, ids)
            for name, repeat, order, answered in answers
        ]
        found = AskedPrompt(case.category, prompt.title[:120], case.sha256, turn, len(ids), runs)
        return found, "".join(reference.pieces)

    def _judged(
        self, run: MethodRun, answered: Answered, reference: Answered, prompt: list[int]
    ) -> MethodRun:
        """Compare an answer with the reference; explain the first difference."""
        position = first_difference(reference.tokens, answered.tokens)
        if position is None:
            return run
        model, tokenizer = self.competitors.model, self.competitors.tokenizer
        logits = reference_logits(model, tokenizer, prompt, reference.tokens, position)
        ours, theirs = (
            a.tokens[position] if position < len(a.tokens) else -1 for a in (answered, reference)
        )
        found = judge(logits, model.backbone.dtype, position, theirs, ours)
        exact = model.backbone.dtype == mx.float32 and not rounds_float32()
        verdict = "near-tie" if found.near_tie and not exact else "different"
        note = (
            f"{_shown(tokenizer, ours)} where mlx-lm has {_shown(tokenizer, theirs)}; "
            f"top-two logit gap {found.gap:.3g}"
        )
        return replace(run, verdict=verdict, position=position, note=note)


def _run(name: str, repeat: int, order: int, answered: Answered) -> MethodRun:
    return MethodRun(
        method=name,
        repeat=repeat,
        order=order,
        prefill_s=answered.prefill_s,
        decode_s=answered.decode_s,
        tokens=len(answered.tokens),
        passes=answered.passes,
        drafted=answered.drafted,
        by_accepted=answered.by_accepted,
        peak_bytes=answered.peak_bytes,
    )


def _shown(tokenizer: TokenizerWrapper, token: int) -> str:
    return "the end" if token < 0 else repr(tokenizer.decode([token]))


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
