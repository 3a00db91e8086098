"""The training loop: batches in, stream weights out; killed at any moment, it continues exactly.

resume or start ─► estimate ─► decode ─► updates ... ─► decode again ─► adapter folder
│  every so often: log, validation, checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..errors import OptionError, SpecStreamError
from ..weights.checkpoint import save_streams
from ..weights.fingerprint import fingerprint
from .batches import BatchPlan, Selection, select, shard
from .calibrate import calibration
from .data import digest
from .decode_eval import decoded_tokens_per_step
from .estimate import check_memory, memory_bytes, try_batch
from .initialise import EMBEDDING_RATE
from .loss import Tensors
from .objective import BatchResult, LosslessObjective
from .optimizer import StreamOptimizer, schedule
from .parallel import sum_results, wait_for_all
from .record import Log, draw_curve
from .state import STATE_FILE, Progress, SavedState, save_state
from .task import Task
from .validate import describe, validate

NAMED = 6


class DivergenceError(SpecStreamError):
    """The loss or its gradient is not a number; the last good checkpoint is kept."""


class Trainer:
    """One run. `run` returns the tokens per step decoded before and after.

    Raises:
        OptionError: the folder holds a run with other options or data.
    """

    def __init__(
        self,
        task: Task,
        objective: LosslessObjective,
        *,
        saved: SavedState | None = None,
        world: mx.distributed.Group | None = None,
    ) -> None:
        options = task.options
        self.task, self.objective, self.options = task, objective, options
        self.world = world or mx.distributed.init()
        self.writes = self.world.rank() == 0
        self.plan = BatchPlan(
            task.train, options.batch_size, options.position_fraction, options.seed
        )
        self.digest = digest([*task.train, *task.valid])
        self.tensors = {name: t.astype(mx.float32) for name, t in task.start.items()}
        self.best: Tensors = {}
        self.progress = Progress(rms=task.rms)
        rate = options.learning_rate
        own = options.embedding_learning_rate or EMBEDDING_RATE * rate * task.rms
        rates = {"embeddings": own, "adapters": rate}
        self.optimizer = StreamOptimizer(self.tensors, rates, options)
        if saved is not None:
            self._resume(saved)
        wait_for_all(self.world)  # all have read before one writes
        self.log = Log(task.folder, self.progress.log_bytes, self.writes)
        self.since = time.monotonic()
        self.whole = True  # weights and optimizer belong to the same update

    def _resume(self, saved: SavedState) -> None:
        if change := self.options.changed(saved.options):
            raise OptionError(
                f"the unfinished run in {self.task.folder} had other options: {change}; give the "
                "same ones, or name another --adapter-path."
            )
        if saved.data_digest != self.digest:
            raise OptionError(
                f"the unfinished run in {self.task.folder} was on other data (or another "
                "tokenizer); give the same data, or name another --adapter-path."
            )
        self.tensors, self.best = dict(saved.weights), dict(saved.best)
        self.optimizer.restore(saved.optimizer)
        self.progress = saved.progress

    def run(self) -> dict[str, dict[str, float]]:
        """Train until the last update or an early stop, and write the adapter folder."""
        options, progress = self.options, self.progress
        last = options.num_updates
        self._announce()
        if not progress.update and not progress.before:
            progress.before = self._decode_eval()
        with tqdm(
            total=last, initial=progress.update, desc="train", disable=None if self.writes else True
        ) as bar:
            try:
                while progress.update < last and not progress.stopped and not progress.over:
                    loss = self._update()
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.3f}")
                    self._watch(bar)
            except KeyboardInterrupt:
                if self.whole:
                    self._save()
                    self.task.say(f"Stopped after {progress.update} updates; --resume continues.")
                raise
        return self._finish()

    def _update(self) -> float:
        """Make one update: gradients of its batches over all processes, then AdamW."""
        options, progress = self.options, self.progress
        batches = self._batches(progress.update)
        result = self._gradients(batches, progress.update)
        self.whole = False
        self.tensors, norm, finite = self.optimizer.update(
            self.tensors, result.gradients, progress.update, self._elapsed()
        )
        if not finite or not math.isfinite(result.total):
            raise self._diverged(batches)
        progress.update += 1
        self.whole = True
        every = max(1, options.steps_per_report // options.grad_accumulation_steps)
        if progress.update % every == 0 or progress.update in (1, options.num_updates):
            self._log_update(batches, result, norm)
        return result.total

    def _batches(self, update: int) -> list[list[Selection]]:
        k = self.options.grad_accumulation_steps
        numbers = range(update * k, min((update + 1) * k, self.options.iters))
        return [self.plan.batch(number) for number in numbers]

    def _gradients(self, batches: Sequence[Sequence[Selection]], update: int) -> BatchResult:
        weights = self.objective.weights(batches)
        total = self.objective.empty(self.tensors)
        for number, batch in enumerate(batches):
            share = shard(batch, self.world.rank(), self.world.size())
            if share:
                place = update * self.options.grad_accumulation_steps + number
                head = self.objective.head(batch, place)
                total.add(self.objective.gradients(self.tensors, share, weights, head))
        return sum_results(total, self.world)

    def _log_update(
        self, batches: Sequence[Sequence[Selection]], result: BatchResult, norm: float
    ) -> None:
        counts = np.maximum(self.objective.counts(batches), 1)
        update = self.progress.update
        record: dict[str, object] = {
            "batch": self._batches_done(),
            "update": update,
            "loss": round(result.total, 5),
        }
        if result.marginal.any():
            record["marginal"] = [round(float(v), 4) for v in result.marginal / counts]
        if result.conditioned is not None:
            record["conditioned"] = [round(float(v), 4) for v in result.conditioned / counts]
        record |= {
            **result.extra,
            "grad_norm": round(norm, 5),
            "lr_factor": round(schedule(self.options, update - 1, self.progress.elapsed_s), 5),
            "elapsed_s": round(self._elapsed(), 2),
            "peak_bytes": mx.get_peak_memory(),
        }
        self.log.write(record)

    def _batches_done(self) -> int:
        done = self.progress.update * self.options.grad_accumulation_steps
        return min(done, self.options.iters)

    def _elapsed(self) -> float:
        """Return the seconds of all sittings."""
        now = time.monotonic()
        self.progress.elapsed_s, self.since = self.progress.elapsed_s + now - self.since, now
        return self.progress.elapsed_s

    def _diverged(self, batches: Sequence[Sequence[Selection]]) -> DivergenceError:
        where = [selection.example.where for batch in batches for selection in batch]
        more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
        kept = "no checkpoint had been written yet"
        if (self.task.folder / STATE_FILE).exists():
            kept = f"the last good checkpoint is kept in {self.task.folder}"
        return DivergenceError(
            f"the loss became NaN or infinite in update {self.progress.update + 1}, on "
            f"{'; '.join(where[:NAMED])}{more}; {kept}; look at these examples, or start again "
            "with a lower --learning-rate (--resume-adapter-file takes up kept streams)."
        )

    def _watch(self, bar: tqdm) -> None:
        """Validate and save when it is time to."""
        options, progress = self.options, self.progress
        k = options.grad_accumulation_steps
        limit_s = 60 * options.max_minutes
        progress.over = bool(limit_s) and self._elapsed() >= limit_s
        last = progress.update == options.num_updates or progress.over
        due = options.steps_per_eval and progress.update % max(1, options.steps_per_eval // k) == 0
        if (due or last) and self.task.valid:
            self._validate(bar)
        if progress.update % max(1, options.save_every // k) == 0 or last or progress.stopped:
            self._save()

    def _validate(self, bar: tqdm) -> None:
        options, progress = self.options, self.progress
        figures = validate(self.objective, self.tensors, self.task.valid, options)
        self.log.write(
            {
                "batch": self._batches_done(),
                "valid": figures,
                "elapsed_s": round(self._elapsed(), 2),
            }
        )
        if self.writes:
            bar.write(f"{self._batches_done():>6} batches: {describe(figures)}")
        losses = figures["loss"]
        assert isinstance(losses, list)
        loss = float(np.mean(losses))
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_update, progress.worse = loss, progress.update, 0
            self.best = dict(self.tensors) if options.patience else {}
        else:
            progress.worse += 1
            progress.stopped = 0 < options.patience <= progress.worse

    def _announce(self) -> None:
        """Say what will be trained, what it takes, and that it fits."""
        task, options = self.task, self.options
        trained = sum(t.size for t in self.tensors.values())
        targets = sum(len(e.positions) for e in task.train)
        if self.writes:
            task.say(
                f"{len(task.train)} texts with {targets:,} positions, {len(task.valid)} held out; "
                f"{task.config.num_streams} streams in the top {task.config.num_msa_layers} of "
                f"{task.backbone.num_layers} layers, {trained:,} parameters."
            )
        by_length = sorted(task.train, key=lambda e: len(e.tokens))[-options.batch_size :]
        longest = [
            select(e, options.position_fraction, (options.seed, 0, i))
            for i, e in enumerate(by_length)
        ]
        check_memory(memory_bytes(task.backbone, task.config, self.tensors, options, longest))
        average = targets / len(task.train) * options.batch_size
        share = average / max(1, sum(len(e.positions) for e in by_length))
        weights = self.objective.weights([longest])
        own = shard(longest, self.world.rank(), self.world.size()) or longest[:1]
        found = try_batch(
            lambda: self.objective.gradients(
                self.tensors, own, weights, self.objective.head(longest, 0)
            ),
            share * options.grad_accumulation_steps,
        )
        if self.writes:
            left = options.num_updates - self.progress.update
            if options.max_minutes:
                left_s = max(0.0, 60 * options.max_minutes - self._elapsed())
                left = min(left, round(left_s / max(found.update_s, 1e-6)))
            task.say(f"It takes {found.describe(left)}.")

    def _decode_eval(self) -> dict[str, float]:
        options, task = self.options, self.task
        prompts = list(task.valid or task.train)[: options.verdict_prompts]
        if not self.writes or not prompts:
            return {}
        tensors = self.best or self.tensors
        limit = (task.backbone, task.config, tensors, prompts, options.verdict_tokens, task.stop)
        return decoded_tokens_per_step(*limit)

    def _save(self) -> None:
        """Write streams and state; process 0 alone."""
        if not self.writes:
            return
        self._elapsed()
        self.progress.log_bytes = self.log.num_bytes
        # The state first: a folder with streams and no state is a finished run.
        save_state(
            self.task.folder,
            SavedState(
                self.tensors,
                self.best,
                self.optimizer.arrays,
                self.progress,
                self.options.to_dict(),
                self.digest,
            ),
        )
        self._save_streams({})

    def _save_streams(self, figures: dict[str, str]) -> None:
        task = self.task
        save_streams(
            task.folder,
            task.config,
            self.best or self.tensors,
            base_model=task.base_name,
            fingerprint=fingerprint(task.backbone.model),
            metadata={"trained_by": "specstream train", "updates": str(self.progress.update),
                      **figures},
        )  # fmt: skip

    def _finish(self) -> dict[str, dict[str, float]]:
        """Compare before with after, write everything, and forget the state."""
        after = self._decode_eval()
        before = self.progress.before
        wait_for_all(self.world)
        if self.writes:
            if self.progress.stopped:
                self.task.say(
                    f"Stopped early: nothing gained since update {self.progress.best_update}, "
                    "whose weights are kept."
                )
            self.log.write({"verdict": {"before": before, "after": after}})
            self.log.close()
            told = {
                f"tokens_per_step_{name.replace(' ', '_')}": f"{v}" for name, v in after.items()
            }
            self._save_streams(told | calibration(self.task, self.best or self.tensors))
            draw_curve(self.task.folder)
            (self.task.folder / STATE_FILE).unlink(missing_ok=True)
        return {"before": before, "after": after}
