"""The stages of an adoption. Each leaves its result whole, and begins where it was stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from tqdm import tqdm

from ...apps.learning import whole_lines
from ...bench.cases import BUILT_IN
from ...config import StreamConfig
from ...errors import StreamsError
from ...loading.load import StreamModel
from ...prompts.lines import json_lines
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
from .plan import ANSWER_TOKENS, AdoptionPlan, check_disk, share_out, train_options, try_out
from .prompts import records_for
from .state import ANSWERS_FILE, AdoptionState, clear

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ENOUGH = 24  # answers, below which there is nothing to train on
LONGEST_PROMPT = 512
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
    _texts: tuple[list[Example], list[Example]] | None = field(default=None, repr=False)

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

    def prompts(self) -> list[PromptToAnswer]:
        """Return what the model can be asked."""
        settings, context = self.state.settings, self.model.context_length
        longest = LONGEST_PROMPT if context is None else min(LONGEST_PROMPT, context // 2)
        records = records_for(settings.prompts, settings.documents)
        return read_prompts(records, self.tokenizer, longest)[0]

    def make_plan(self) -> AdoptionPlan:
        """Try out what it takes here and share out the minutes; nothing is kept but the time."""
        state, started = self.state, time.monotonic()
        rates = try_out(
            self.model, self.tokenizer, self.prompts(), state.settings.mode, self.folder
        )
        known = 0
        for path in (self.folder / ANSWERS_FILE, self.learned):
            if path is not None and path.exists():
                known += sum(len(json.loads(line)["answer_ids"]) for line in whole_lines(path))
        left_s = max(1.0, state.left_s - (time.monotonic() - started))
        plan = share_out(rates, left_s, known)
        check_disk(plan, self.folder)
        return plan

    def answers(self) -> None:
        """Write the model's own answers, a round of them at a time, while the time for it lasts."""
        if ANSWERS in self.state.done:
            return
        path, plan = self.folder / ANSWERS_FILE, self.plan
        done = {index for _, index in answered(path)}
        left = [prompt for prompt in self.prompts() if prompt.index not in done]
        known = len(done) + (sum(1 for _ in whole_lines(self.learned)) if self.learned else 0)
        with (
            self.state.stage(ANSWERS) as clock,
            tqdm(desc="answers", initial=len(done), unit="", disable=None) as bar,
        ):

            def on_record(_: dict[str, Any]) -> None:
                bar.update()
                clock.tick()

            round_s, spent = 0.0, clock.tick()
            for first in range(0, len(left), plan.answer_batch):
                # A round is begun if half of it fits: what it has begun, it finishes.
                if known >= ENOUGH and spent + round_s / 2 > plan.answer_s:
                    break
                chosen = left[first : first + plan.answer_batch]
                answer_prompts(
                    self.model,
                    self.tokenizer,
                    chosen,
                    path,
                    max_tokens=ANSWER_TOKENS,
                    batch_size=plan.answer_batch,
                    on_record=on_record,
                )
                known += len(chosen)
                before, spent = spent, clock.tick(save=True)
                round_s = spent - before
        mx.clear_cache()
        self.say(f"{len(answered(path)):,} answers are there.")

    def texts(self) -> tuple[list[Example], list[Example]]:
        """Return the texts to train on and those held out; the same at every call.

        What chat and serve kept is copied once, so that more of it changes nothing of a run begun.
        """
        if self._texts is None:
            data = self.folder / "data.jsonl"
            if not data.exists():
                with atomic_file(data, if_exists="replace") as partial, partial.open("wb") as file:
                    partial.chmod(0o600)
                    for path in (self.folder / ANSWERS_FILE, self.learned):
                        if path is not None and path.exists():
                            file.writelines(whole_lines(path))
            options = train_options(self.model, self.state.settings.mode)
            self._texts = read_data(str(data), self.tokenizer, self.model, options, talk=False)
        return self._texts

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
        train, valid = self.texts()
        if not _is_over(run):
            saved = resumable(run, resume=True)
            options = train_options(
                self.model,
                state.settings.mode,
                further=self.given is not None,
                max_minutes=state.figures["train_minutes"],
                batch_size=self.plan.train_batch,
                save_every=self.plan.save_every,
                val_batches=8,
            )
            task = make_task(
                self.model,
                self.tokenizer,
                options,
                train,
                valid,
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

    def _few(self) -> list[Example]:
        train, valid = self.texts()
        return (valid or train)[:JUDGED_PROMPTS]

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


def held_out_prompts(adoption: Adoption) -> list[dict[str, Any]]:
    """Return the messages that asked for the held-out answers; none that a chat or a client wrote."""
    path = adoption.folder / ANSWERS_FILE
    by_tokens = {}
    for line in whole_lines(path) if path.exists() else ():
        record = json.loads(line)
        by_tokens[tuple(record["prompt_ids"])] = record["messages"][:-1]
    _, valid = adoption.texts()
    return [
        {"messages": by_tokens[example.prompt], "category": "held out"}
        for example in valid
        if example.prompt in by_tokens
    ]


def prompt_source(adoption: Adoption) -> str:
    """Return what a benchmark asks: a file of the held-out prompts, the built-in ones if there are none."""
    path = adoption.folder / "heldout.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in held_out_prompts(adoption)]
    if not lines:
        return BUILT_IN
    with atomic_file(path, if_exists="replace") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _log_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log, none if it has not begun."""
    path = run / LOG_FILE
    found = (record for record, _ in json_lines(path)) if path.exists() else ()
    return [record for record in found if isinstance(record, dict)]


def _is_over(run: Path) -> bool:
    """Tell whether a run of training has written its last."""
    no_state = not (run / TRAINING_STATE).exists()
    return no_state and any("verdict" in record for record in _log_of(run))
