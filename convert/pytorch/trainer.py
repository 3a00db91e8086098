"""Training with PyTorch: steps of one optimizer over epochs of texts that may grow; knows no loss."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from ...errors import DataError, OptionError
from ...train.batches import Selection, epoch_batches, number_of, select
from ...train.data import Example, read_distilled, split_held_out
from ...train.loop import TrainingLoop
from ...train.next_token import NUM_TEXTS, fit_next_token
from ...train.options import TrainOptions
from ...train.progress import Budget, Estimate, Progress, described, rate_factor
from ...train.record import LOG_FILE, Log
from ...train.vocabulary import VocabularySampler
from ...weights.files import atomic_file
from . import workers
from .backbone import TorchBackbone
from .checkpoint import save_checkpoint
from .objectives import Common
from .start import make_adapters, make_objective, parameter_groups
from .states import StateReader, States, compute_states


class TorchTrainer(TrainingLoop):
    """One training run. options: what the command line has in common with MLX's; args: all of it."""

    to_continue = "the same command continues"

    def __init__(self, args: argparse.Namespace, options: TrainOptions) -> None:
        torch.manual_seed(options.seed)
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args, self.options = args, options
        self.output = Path(args.output)
        self.work = self.output.with_name(self.output.name + ".partial-train")
        self.work.mkdir(parents=True, exist_ok=True)
        self.backbone = TorchBackbone.load(args.model, getattr(torch, args.dtype))
        self.adapters = make_adapters(args, options, self.backbone)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(args, self.adapters), betas=(0.9, options.beta2), weight_decay=0.0
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.progress, self.budget = Progress(), Budget(options.iters, args.max_minutes)
        self.reader = StateReader(*args.states) if args.states else None
        self.train, self.held_out = self._texts()
        self.state_file = self.work / "state.pt"
        if not self.state_file.exists():
            self._fit_next_token()
        answers = (e.answer for e in self.train)
        sampler = VocabularySampler.of(
            self.backbone.vocab_size, answers, args.num_frequent, args.num_random
        )
        common = Common(self.backbone, self.adapters, sampler, self._states, options.alpha_decay)
        self.objective = make_objective(args, options, common)
        if self.state_file.exists():
            self._resume()
        self.writes = not workers.rank()
        self.log = Log(self.work, self.progress.log_bytes, self.writes)
        self.epoch: Iterator[list[Selection]] | None = None
        self.since = self.last_save = self.last_validation = self.now()

    def now(self) -> float:
        return workers.first_s(super().now())

    def say(self, line: str) -> None:
        if self.writes:
            print(line, flush=True)

    def _texts(self) -> tuple[list[Example], list[Example]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.args.model, local_files_only=True)
        examples = read_distilled(self.args.data, tokenizer, self.options.max_seq_length)
        if self.reader is not None:
            examples = [e for e in examples if e.key in self.reader]
        train, held_out = split_held_out(examples, self.options.held_out)
        if not train:
            raise DataError(
                f"there is no text to train on: of {len(examples)} that can be used "
                f"{len(held_out)} are held out; give more, or lower --held-out."
            )
        return train, held_out

    def _refresh(self) -> None:
        """Take in texts that were added to the data files since; held-out prompts stay held out."""
        if self.args.states:
            self.reader = StateReader(*self.args.states)
        held = {e.prompt for e in self.held_out}
        train, newly_held = self._texts()
        self.train = [e for e in (*train, *newly_held) if e.prompt not in held]

    def _states(self, example: Example) -> States:
        if self.reader is not None:
            return self.reader[example.key]
        with torch.no_grad():
            return compute_states(
                self.backbone, example.prompt, example.answer, self.adapters.config.num_msa_layers
            )

    def _fit_next_token(self) -> None:
        """Give a map of the next token that is still zero its start, from the training texts."""
        target = self.adapters.next_token
        if target is None or target.lora_B.weight.any():
            return
        texts = (
            (
                self._states(e).hidden.float().numpy(),
                self.backbone.embed(torch.tensor(e.answer[:-1])).float().numpy(),
            )
            for e in self.train[:NUM_TEXTS]
        )
        found = fit_next_token(self.adapters.config.next_token_rank, texts)
        target.lora_A.weight.data.copy_(torch.from_numpy(found.a.T))
        target.lora_B.weight.data.copy_(torch.from_numpy(found.b.T))
        if not workers.rank():
            print(
                f"the next token explains {found.share:.0%} of how hidden states change", flush=True
            )

    def _batches(self, epoch: int) -> Iterator[list[Selection]]:
        return epoch_batches(
            self.train,
            num_positions=self.args.positions,
            fraction=self.options.position_fraction,
            seed=self.options.seed,
            epoch=epoch,
            group_size=self.args.group_size,
        )

    def _next_batch(self) -> list[Selection]:
        """Return the batch that follows; a new epoch takes in what was added to the data."""
        progress = self.progress
        while True:
            if self.epoch is None:
                if progress.epoch and not progress.batch:
                    self._refresh()
                self.epoch = islice(self._batches(progress.epoch), progress.batch, None)
            if (batch := next(self.epoch, None)) is not None:
                return batch
            progress.epoch, progress.batch, self.epoch = progress.epoch + 1, 0, None

    def rate(self) -> float:
        """Return the learning rate's factor: linear warm-up, then linear decay until the budget is spent."""
        done, options = self.budget.spent(self.progress), self.options
        return rate_factor(
            self.progress.update, done, warmup=options.warmup, final=options.final_lr
        )

    def make_update(self) -> str:
        batch = self._next_batch()
        record = self.step(batch)
        self.progress.batch += 1
        self.count_time()
        self._write(record)
        return f"loss={record.get('loss', record.get('main_loss'))}, epoch={self.progress.epoch}"

    def step(self, batch: Sequence[Selection]) -> dict[str, object]:
        """Make one optimizer step; return what goes to the log."""
        factor = self.rate()
        self.objective.done = self.budget.spent(self.progress)
        total, figures = self.objective.loss(batch, (self.options.seed, self.progress.update))
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        if (
            total.requires_grad
        ):  # a process without a share of the batch has nothing to differentiate
            total.backward()
        workers.sum_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, self.options.clip or torch.inf)
        self.whole = False
        if torch.isfinite(norm):
            self.optimizer.step()
        self.progress.update += 1
        self.progress.positions += sum(len(s.positions) for s in batch)
        self.whole = True
        return {**figures, "grad_norm": round(float(norm), 4), "lr_factor": round(factor, 5)}

    def validation_is_due(self) -> bool:
        seconds = self.args.eval_seconds
        late = seconds and self.now() - self.last_validation > seconds
        return bool(late and self.held_out and not self.is_over)

    def checkpoint_is_due(self) -> bool:
        return self.now() - self.last_save > self.args.save_seconds and not self.is_over

    def validate(self) -> None:
        """Measure the held-out texts with the whole vocabulary, at a fixed sample of positions."""
        self._write({"held_out": self._figures()})
        self.last_validation = self.now()

    def _figures(self) -> dict[str, object]:
        fraction = self.args.eval_fraction
        return self.objective.evaluate(
            [select(e, fraction, (number_of(e),)) for e in self.held_out]
        )

    def _write(self, record: dict[str, object]) -> None:
        self.log.write({**self._place(), **record})

    def _place(self) -> dict[str, object]:
        """Return where the run stands, as every line of the log begins."""
        progress = self.progress
        return {
            "step": progress.update,
            "epoch": progress.epoch,
            "batch": progress.batch,
            "elapsed_s": progress.elapsed_s,
            "positions": progress.positions,
        }

    def run(self) -> None:
        """Train until the budget is spent, then write the checkpoint."""
        self._announce()
        self.since = self.last_save = self.last_validation = self.now()
        self.make_updates()
        if self.held_out:
            self._write({"held_out": self._figures(), "final": True})
        self.save()
        self.log.close()
        if self.writes:
            self._export()

    def _announce(self) -> None:
        config = self.adapters.config
        shape = f"{config.num_streams} streams in the top {config.num_msa_layers} layers"
        trained = sum(p.numel() for p in self.adapters.parameters())
        self.say(
            f"{described(self.train, self.held_out, shape, trained)} "
            f"{self.options.position_fraction:.0%} of the positions an epoch; budget {self.budget}, "
            f"{self.progress.update} updates done."
        )
        if not self.writes:
            return
        trial = next(self._batches(0))
        started = time.monotonic()
        with torch.no_grad():
            self.objective.loss([trial[0]], (0,))
        # A step costs three times its forward pass; the trial is one text of the batch.
        share = len(trial[0].positions) / sum(len(s.positions) for s in trial)
        found = Estimate(3 * (time.monotonic() - started) / share / workers.count())
        left = self.budget.updates_left(self.progress, found.update_s)
        self.say(f"It takes {found.describe(left)}.")

    def save(self) -> None:
        """Write the state; process 0 alone."""
        self.last_save = self.since
        if not self.writes:
            return
        self.progress.log_bytes = self.log.num_bytes
        state = {
            "adapters": self.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        with atomic_file(self.state_file, if_exists="replace") as path:
            torch.save(state, path)

    def _resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        if not {"update", "log_bytes"} <= state["progress"].keys():
            raise OptionError(
                f"the unfinished run in {self.work} was begun with an earlier version and cannot be "
                "continued exactly; remove that folder, or name another --output."
            )
        self.adapters.load_state_dict(state["adapters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def _export(self) -> None:
        sources: dict[str, int] = {}
        for example in self.train:
            sources[example.key[0]] = sources.get(example.key[0], 0) + 1
        described = {
            "arguments": {name: _portable(name, value) for name, value in vars(self.args).items()},
            "progress": self._place(),
            "texts_by_source": sources,
            "answer_positions": sum(len(e.positions) for e in self.train),
        }
        extra = {
            LOG_FILE: (self.work / LOG_FILE).read_text(encoding="utf-8"),
            "train_args.json": json.dumps(described, indent=1) + "\n",
        }
        name = self.args.base_name or self.args.model
        save_checkpoint(
            self.output, self.adapters, name, getattr(torch, self.args.save_dtype), extra
        )
        print(f"wrote {self.output}", flush=True)


def _portable(name: str, value: object) -> object:
    """Return an argument as it goes into the checkpoint: of a path its last part alone."""
    if name in ("data", "states") and isinstance(value, list):
        return [Path(part).name for part in value]
    if name in ("model", "output", "start_from") and value:
        return Path(str(value)).name
    return value
