"""The stages of an adoption. Each leaves its result whole, and begins where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from tqdm import tqdm

from ...apps.learning import whole_lines
from ...config import StreamConfig
from ...errors import DataError, StreamsError
from ...loading.load import StreamModel
from ...prompts.lines import json_lines
from ...train.awake import awake_s
from ...train.calibrate import accepted_scores, threshold_of
from ...train.data import Example
from ...train.decode_eval import decoded_tokens_per_step
from ...train.distilled import PromptToAnswer, answered
from ...train.loss import Tensors
from ...train.record import LOG_FILE
from ...train.state import STATE_FILE as TRAINING_STATE
from ...train.state import resumable
from ...train.trainer import Trainer
from ...weights.checkpoint import StreamWeights, load_streams, save_streams
from ...weights.files import atomic_file
from ...weights.fingerprint import fingerprint
from ..distill import answer_prompts, read_prompts
from ..train import make_objective, make_task, read_data
from .plan import (
    ANSWER_TOKENS,
    ENOUGH,
    LONGEST_PROMPT,
    MOST_ANSWERING,
    AdoptionPlan,
    check_disk,
    share_out,
    train_options,
    try_out,
)
from .prompts import records_for
from .state import ANSWERS_FILE, HELD_OUT_FILE, LEARNED_FILE, AdoptionState, clear

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

HELD_OUT, HELD_OUT_EVERY = 32, 9  # of the prompts every so many is kept to judge by, up to so many
ANSWERS, TRAINING = "answers", "training"
WORSE = 0.97
JUDGED_PROMPTS, JUDGED_TOKENS = 6, 48


@dataclass
class Adoption:
    """One model being adopted.

    base_name: what cards call the model. given: streams to train on top of. learned: answers that
    chat and serve kept, to train on as well.
    """

    state: AdoptionState
    model: StreamModel
    tokenizer: TokenizerWrapper
    base_name: str
    given: StreamWeights | None = None
    learned: Path | None = None
    say: Callable[[str], None] = lambda line: print(line, flush=True)

    @property
    def folder(self) -> Path:
        return self.state.folder

    @property
    def plan(self) -> AdoptionPlan:
        assert self.state.plan is not None
        return AdoptionPlan.from_dict(self.state.plan)

    @property
    def made(self) -> Path:
        """Return the folder of the streams as they will be installed."""
        return self.folder / "made"

    @cached_property
    def prompts(self) -> tuple[list[PromptToAnswer], list[PromptToAnswer]]:
        """Return what the model can be asked, and what it is not asked but judged by afterwards.

        Raises:
            DataError: no prompt fits into the model's context.
        """
        settings, context = self.state.settings, self.model.context_length
        longest = LONGEST_PROMPT if context is None else min(LONGEST_PROMPT, context // 2)
        records = records_for(settings.prompts, settings.documents)
        found, too_long = read_prompts(records, self.tokenizer, longest)
        if too_long:
            self.say(f"{too_long} prompts of more than {longest} tokens are left out.")
        if len(found) < 2:
            raise DataError("none of the prompts fits into the model's context; give shorter ones.")
        every = min(HELD_OUT_EVERY, len(found))
        kept = set(range(every - 1, len(found), every)[:HELD_OUT])
        return [p for i, p in enumerate(found) if i not in kept], [found[i] for i in sorted(kept)]

    def held_out(self) -> list[list[int]]:
        """Return the prompts to judge by, as token ids: kept answers' and built-in ones in turn."""
        learned = (list(example.prompt) for example in self.texts[1])
        others = (prompt.tokens for prompt in self.prompts[1])
        return [p for pair in zip_longest(learned, others) for p in pair if p is not None]

    def make_plan(self) -> AdoptionPlan:
        """Try out what it takes here and share out the minutes; nothing is kept but the time."""
        state, started = self.state, awake_s()
        mode = state.settings.mode
        rates = try_out(self.model, self.tokenizer, self.prompts[0], mode, self.folder, self.given)
        files = (self.folder / ANSWERS_FILE, self.learned)
        known = sum(len(record["answer_ids"]) for path in files for record in _records(path))
        left_s = max(1.0, state.left_s - (awake_s() - started))
        plan = share_out(rates, left_s, known)
        check_disk(plan, self.folder)
        return plan

    def answers(self) -> None:
        """Write the model's own answers until there is enough to train on for the rest of the time.

        The last ones are cut short.
        """
        if ANSWERS in self.state.done:
            return
        path, plan = self.folder / ANSWERS_FILE, self.plan
        answered(path)  # cuts off what a kill left unfinished
        done = {tuple(record["prompt_ids"]) for record in _records(path)}
        left = [prompt for prompt in self.prompts[0] if tuple(prompt.tokens) not in done]
        files = (path, self.learned)
        lengths = [len(record["answer_ids"]) for each in files for record in _records(each)]
        known, known_tokens = len(lengths), sum(lengths)
        most_s = MOST_ANSWERING * (plan.answer_s + plan.train_s)
        with (
            self.state.stage(ANSWERS) as clock,
            tqdm(desc="answers", initial=len(done), unit="", disable=None) as bar,
        ):

            def on_record(_: dict[str, Any]) -> None:
                nonlocal known
                known += 1
                bar.update()

            def is_over(tokens: int) -> bool:
                spent_s, left_s = clock.tick(), self.state.left_s - plan.measure_s
                enough = known_tokens + tokens > plan.rates.positions_s * left_s
                return known >= ENOUGH and (enough or spent_s > most_s)

            answer_prompts(
                self.model,
                self.tokenizer,
                left,
                path,
                max_tokens=ANSWER_TOKENS,
                batch_size=plan.answer_batch,
                on_record=on_record,
                is_over=is_over,
            )
        mx.clear_cache()
        self.say(f"{len(answered(path)):,} answers are there.")

    @cached_property
    def texts(self) -> tuple[list[Example], list[Example]]:
        """Return the texts to train on and those held out, which are of what chat and serve kept.

        That is copied once, so that more of it changes nothing of a run begun.
        """
        copy = self.folder / LEARNED_FILE
        if self.learned is not None and not copy.exists():
            with atomic_file(copy, if_exists="replace") as partial, partial.open("wb") as file:
                partial.chmod(0o600)
                file.writelines(whole_lines(self.learned))
        train: list[Example] = []
        held: list[Example] = []
        for path, held_out in ((self.folder / ANSWERS_FILE, 0), (copy, HELD_OUT)):
            if path.exists() and path.stat().st_size:
                options = train_options(self.model, self.state.settings.mode, held_out=held_out)
                found = read_data(str(path), self.tokenizer, self.model, options, talk=False)
                train, held = train + found[0], held + found[1]
        judged_by = {tuple(prompt.tokens) for prompt in self.prompts[1]}
        return [example for example in train if example.prompt not in judged_by], held

    def training(self) -> None:
        """Train until the time for it is up, and make the folder of finished streams."""
        if TRAINING in self.state.done:
            return
        run, state = self.folder / "training", self.state
        if not (run / TRAINING_STATE).exists() and not _is_over(run):
            shutil.rmtree(run, ignore_errors=True)
        if "train_minutes" not in state.figures:
            # What other stages took more or less than planned is made up for here.
            left = state.left_s - self.plan.measure_s
            state.figures["train_minutes"] = max(left, 0.25 * self.plan.train_s) / 60
            state.save()
        train, _ = self.texts
        if not train:
            raise DataError(
                "the model ends every answer at once; there is nothing to learn from it."
            )
        if not _is_over(run):
            saved = resumable(run, resume=True)
            options = train_options(
                self.model,
                state.settings.mode,
                further=self.given is not None,
                max_minutes=state.figures["train_minutes"],
                batch_size=self.plan.train_batch,
                save_every=self.plan.save_every,
                warmup=self.plan.warmup,
            )
            task = make_task(
                self.model,
                self.tokenizer,
                options,
                train,
                [],  # what was gained is measured afterwards, once
                folder=run,
                base_name=self.base_name,
                given=self.given,
                saved=saved,
                say=self.say,
            )
            before = saved.progress.elapsed_s if saved else 0.0
            trainer = Trainer(task, make_objective(task), saved=saved)
            trainer.to_continue = "the same command goes on"
            try:
                trainer.run()
            finally:
                state.spent[TRAINING] = max(before, trainer.progress.elapsed_s)
                state.save()
        with state.stage(TRAINING):
            updates = [r for r in _log_of(run) if "loss" in r]
            state.figures["updates"] = updates[-1]["update"] if updates else 0
            state.figures["texts"] = len(train)
            weights = load_streams(run)
            # As they will be used: in 16 bits.
            tensors = {name: tensor.astype(mx.bfloat16) for name, tensor in weights.tensors.items()}
            self._refuse_worse(weights.config, tensors)
            self._make(weights, tensors)
            shutil.copyfile(run / LOG_FILE, self.made / "training_log.jsonl")

    def _refuse_worse(self, config: StreamConfig, tensors: Tensors) -> None:
        """Stop before streams that were trained further, and got worse, take the place of better ones.

        Raises:
            StreamsError: they got worse.
        """
        if self.given is None:
            return
        before = self._chain(self.given.config, self.given.tensors)
        after = self._chain(config, tensors)
        self.state.figures["chain_before"] = before
        if after < WORSE * before:
            clear(self.folder)
            raise StreamsError(
                f"training further made the streams worse ({before:.2f} tokens per pass before, "
                f"{after:.2f} after), so the old ones stay in use; give it more --minutes."
            )

    def _chain(self, config: StreamConfig, tensors: Tensors) -> float:
        """Return tokens per pass as a chain on a few held-out prompts."""
        stop = set(self.tokenizer.eos_token_ids)
        found = decoded_tokens_per_step(
            self.model.backbone, config, tensors, self._few(), JUDGED_TOKENS, stop
        )
        return found.get("chain", 1.0)

    def _few(self) -> list[list[int]]:
        return self.held_out()[:JUDGED_PROMPTS]

    def _make(self, weights: StreamWeights, tensors: Tensors) -> None:
        """Calibrate the pruner and write the finished streams into a folder that appears whole."""
        metadata = {**weights.metadata, "trained_by": "specstream adopt"}
        if weights.config.pruner_rank:
            stop = set(self.tokenizer.eos_token_ids)
            scores = accepted_scores(
                self.model.backbone, weights.config, tensors, self._few(), JUDGED_TOKENS, stop
            )
            threshold, kept = threshold_of(scores)
            metadata |= {"prune_threshold": f"{threshold:g}", "prune_kept": f"{kept:.4f}"}
        shutil.rmtree(self.made, ignore_errors=True)
        save_streams(
            self.made,
            weights.config,
            tensors,
            base_model=self.base_name,
            fingerprint=fingerprint(self.model.model),
            metadata=metadata,
        )


def prompt_source(adoption: Adoption) -> str:
    """Return what a benchmark asks: a file of the held-out prompts; none that a chat or client wrote."""
    path = adoption.folder / HELD_OUT_FILE
    records = [{"messages": p.messages, "category": "held out"} for p in adoption.prompts[1]]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    with atomic_file(path, if_exists="replace") as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return str(path)


def _records(path: Path | None) -> Iterator[dict[str, Any]]:
    """Yield what a file of answers holds, if there is one."""
    if path is not None and path.exists():
        yield from map(json.loads, whole_lines(path))


def _log_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log, none if it has not begun."""
    path = run / LOG_FILE
    found = (record for record, _ in json_lines(path)) if path.exists() else ()
    return [record for record in found if isinstance(record, dict)]


def _is_over(run: Path) -> bool:
    """Tell whether a run of training has written its last."""
    no_state = not (run / TRAINING_STATE).exists()
    return no_state and any("verdict" in record for record in _log_of(run))
