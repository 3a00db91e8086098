"""Training with MLX: batches in, stream weights out.

resume or start ─► estimate ─► decode ─► the loop's updates ─► decode again ─► adapter folder
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import OptionError, SpecStreamError
from ..weights.checkpoint import save_streams
from ..weights.fingerprint import fingerprint
from .batches import BatchPlan, Selection, select, shard
from .calibrate import calibration
from .curve import draw_own_curve
from .data import digest
from .decode_eval import decoded_tokens_per_step
from .estimate import check_memory, memory_bytes, try_batch
from .initialise import EMBEDDING_RATE
from .loop import TrainingLoop
from .loss import Tensors
from .objective import BatchResult, LosslessObjective
from .optimizer import StreamOptimizer, schedule
from .parallel import sum_results, wait_for_all
from .progress import Budget, Progress, described
from .record import Log
from .state import STATE_FILE, SavedState, save_state
from .task import Task
from .validate import describe, validate

NAMED = 6


class DivergenceError(SpecStreamError):
    """The loss or its gradient is not a number; the last good checkpoint is kept."""


class Trainer(TrainingLoop):
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
        self.budget = Budget(options.num_updates, options.max_minutes)
        rate = options.learning_rate
        own = options.embedding_learning_rate or EMBEDDING_RATE * rate * task.rms
        rates = {"embeddings": own, "adapters": rate}
        self.optimizer = StreamOptimizer(self.tensors, rates, options)
        if saved is not None:
            self._resume(saved)
        wait_for_all(self.world)  # all have read before one writes
        self.log = Log(task.folder, self.progress.log_bytes, self.writes)
        self.since = self.now()

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
        self._announce()
        if not self.progress.update and not self.progress.before:
            self.progress.before = self._decode_eval()
        self.make_updates()
        return self._finish()

    def say(self, line: str) -> None:
        if self.writes:
            self.task.say(line)

    def make_update(self) -> str:
        """Make one update: gradients of its batches over all processes, then AdamW."""
        options, progress = self.options, self.progress
        batches = self._batches(progress.update)
        result = self._gradients(batches, progress.update)
        self.whole = False
        self.tensors, norm, finite = self.optimizer.update(
            self.tensors, result.gradients, progress.update, self.count_time()
        )
        if not finite or not math.isfinite(result.total):
            raise self._diverged(batches)
        progress.update += 1
        self.whole = True
        self.count_time()
        if self._is_due(options.steps_per_report) or progress.update == 1:
            self._log_update(batches, result, norm)
        return f"loss={result.total:.3f}"

    def _batches(self, update: int) -> list[list[Selection]]:
        k = self.options.grad_accumulation_steps
        numbers = range(update * k, min((update + 1) * k, self.options.num_batches))
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
            "elapsed_s": round(self.count_time(), 2),
            "peak_bytes": mx.get_peak_memory(),
        }
        self.log.write(record)

    def _batches_done(self) -> int:
        done = self.progress.update * self.options.grad_accumulation_steps
        return min(done, self.options.num_batches)

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

    def _is_due(self, batches: int) -> bool:
        """Tell whether so many batches have passed once more, or all of them."""
        every = max(1, batches // self.options.grad_accumulation_steps)
        return self.progress.update % every == 0 or self.budget.spent(self.progress) >= 1

    def validation_is_due(self) -> bool:
        often = self.options.steps_per_eval or self.options.num_batches
        return bool(self.task.valid) and self._is_due(often)

    def checkpoint_is_due(self) -> bool:
        return self._is_due(self.options.save_every) or self.progress.stopped

    def validate(self) -> str:
        figures = validate(self.objective, self.tensors, self.task.valid, self.options)
        batch = self._batches_done()
        self.log.write({"batch": batch, "valid": figures, "elapsed_s": round(self.count_time(), 2)})
        losses = figures["loss"]
        assert isinstance(losses, list)
        if self.progress.judge(float(np.mean(losses)), self.options.patience):
            self.best = dict(self.tensors) if self.options.patience else {}
        return f"{batch:>6} batches: {describe(figures)}"

    def _announce(self) -> None:
        """Say what will be trained, what it takes, and that it fits."""
        task, options = self.task, self.options
        shape = (
            f"{task.config.num_streams} streams in the top {task.config.num_msa_layers} of "
            f"{task.backbone.num_layers} layers"
        )
        trained = sum(t.size for t in self.tensors.values())
        self.say(described(task.train, task.valid, shape, trained))
        by_length = sorted(task.train, key=lambda e: len(e.tokens))[-options.batch_size :]
        longest = [
            select(e, options.position_fraction, (options.seed, 0, i))
            for i, e in enumerate(by_length)
        ]
        check_memory(memory_bytes(task.backbone, task.config, self.tensors, options, longest))
        if self.budget.minutes:  # known without a trial
            self.say(f"It takes {self.budget}.")
            return
        average = sum(len(e.positions) for e in task.train) / len(task.train) * options.batch_size
        share = average / max(1, sum(len(e.positions) for e in by_length))
        weights = self.objective.weights([longest])
        own = shard(longest, self.world.rank(), self.world.size()) or longest[:1]
        found = try_batch(
            lambda: self.objective.gradients(
                self.tensors, own, weights, self.objective.head(longest, 0)
            ),
            share * options.grad_accumulation_steps,
        )
        left = self.budget.updates_left(self.progress, found.update_s)
        self.say(f"It takes {found.describe(left)}.")

    def _decode_eval(self) -> dict[str, float]:
        options, task = self.options, self.task
        prompts = task.prompts[: options.verdict_prompts]
        if not self.writes or not prompts:
            return {}
        tensors = self.best or self.tensors
        limit = (task.backbone, task.config, tensors, prompts, options.verdict_tokens, task.stop)
        return decoded_tokens_per_step(*limit)

    def save(self) -> None:
        """Write streams and state; process 0 alone."""
        if not self.writes:
            return
        self.count_time()
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
            draw_own_curve(self.task.folder)
            (self.task.folder / STATE_FILE).unlink(missing_ok=True)
        return {"before": before, "after": after}
